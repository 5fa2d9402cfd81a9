"""Which checkpoints stay."""

from pathlib import Path

import pytest
import torch

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import Fragment, Measured
from train.checkpoint.retention import Retention, Saved, choose_doomed
from train.ranks import alone

LOSSES = [5.0, 3.0, 4.0, 2.0, None, 6.0]
SAVED = [Saved(step, loss) for step, loss in zip(range(10, 70, 10), LOSSES, strict=True)]


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Retention(newest=1), [60]),
        (Retention(newest=2), [50, 60]),
        (Retention(newest=1, every=20), [20, 40, 60]),
        (Retention(newest=1, best=1), [40, 60]),
        (Retention(newest=1, best=2), [20, 40, 60]),
        (Retention(newest=1, best=9), [10, 20, 30, 40, 60]),
        (Retention(newest=2, every=30, best=1), [30, 40, 50, 60]),
        (Retention(newest=9), [10, 20, 30, 40, 50, 60]),
    ],
)
def test_what_any_part_of_the_rule_keeps_stays(rule: Retention, kept: list[int]) -> None:
    doomed = choose_doomed(SAVED, rule)
    assert sorted({saved.step for saved in SAVED} - set(doomed)) == kept


def save(checkpoints: Checkpoints, step: int, loss: float | None) -> None:
    about = {"progress": {}, "tokenizer": "", "layout": {}, "versions": {}, "config": {}}
    evaluation = Measured(step, loss) if loss is not None else None
    fragment = Fragment("weight/a", (4,), 0, torch.ones(4))
    about |= {"evaluation": evaluation}  # type: ignore[dict-item]
    checkpoints.save(step, [fragment], ranks=alone(), about=about)


def test_the_best_is_known_from_the_manifests_after_a_restart(tmp_path: Path) -> None:
    for step, loss in ((1, 2.0), (2, 9.0), (3, 1.0), (4, None), (5, 3.0)):
        save(Checkpoints(tmp_path, keep=1, keep_best=2), step, loss)
    assert Checkpoints(tmp_path).steps() == [1, 3, 5]


def test_the_last_good_one_stays_until_another_is_whole(tmp_path: Path) -> None:
    """Two newer ones are damaged; the run goes on from step 1 and may not lose it before."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        save(Checkpoints(tmp_path, keep=3), step, None)
    for step in (2, 3):
        (checkpoints.path(step) / "rank-00000.safetensors").unlink()
    newest = checkpoints.find_newest(alone())
    assert newest is not None
    assert newest.step == 1
    assert checkpoints.steps() == [1, 2, 3], "looking removes nothing"
    save(checkpoints, 2, None)
    assert checkpoints.steps() == [2]
    assert checkpoints.find_newest(alone()) is not None
