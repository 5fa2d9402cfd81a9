"""`profile=true` on whole runs: what is written, and that nothing else changes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.cost import flops_per_token
from model.recompute import Recompute
from tests.ranks import run_ranks
from tests.train.tiny import SEQ_LEN, tiny_model, tiny_run
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import RunConfig, check_run
from train.engine.engine import join
from train.journal import read_records
from train.layout.parallel import ParallelConfig
from train.loop import train
from train.profile.parts import Part
from train.profile.report import PROFILE_FILE
from train.profile.steps import check_steps
from train.profile.work import Documents, work_of
from train.schedule import ConstantSchedule

EVERY_LAYOUT: list[dict[str, Any]] = [
    {"zero_stage": 0, "expert": 2},
    {"zero_stage": 2},
    {"zero_stage": 3, "expert": 2, "recompute": Recompute.full},
    {"sequence": 2, "recompute": Recompute.selective},
    {"pipeline": 2},
]
NUMBERS = ("loss", "mtp_loss_1", "balance_loss", "grad_norm", "max_vio", "samples")


def start(folder: Path, corpus: Path, *, profile: bool, **layout: Any) -> list[list[Any]]:
    """The numbers of a run's steps on two ranks."""
    parallel = ParallelConfig(micro_batch_size=2, **layout)
    config = tiny_run(
        folder / str(profile),
        parallel=parallel,
        checkpoint=CheckpointConfig(every=100, asynchronous=False),
        schedule=ConstantSchedule(steps=5, batch_size=8, peak_lr=1e-2),
        profile=profile,
        profile_steps=1,
    )
    config.data.folder = str(corpus)
    check_run(config, num_ranks=2)
    Path(config.run_dir).mkdir(parents=True)
    run_ranks(2, lambda: train(config, join(parallel, timeout_minutes=5)))
    records = read_records(Path(config.run_dir), event="step")
    return [[record[name] for name in NUMBERS] for record in records]


@pytest.mark.parametrize(
    "layout",
    [
        {"zero_stage": 1, "expert": 2},
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in EVERY_LAYOUT),
    ],
)
def test_profiled_steps_compute_the_same_bits_and_their_parts_add_up(
    layout: dict[str, Any], tmp_path: Path, corpus: Path
) -> None:
    profiled = start(tmp_path, corpus, profile=True, **layout)
    assert profiled == start(tmp_path, corpus, profile=False, **layout)
    assert not list((tmp_path / "False").rglob(PROFILE_FILE))
    (path,) = (tmp_path / "True").rglob(PROFILE_FILE)
    profile = json.loads(path.read_text())
    parts = {part["part"]: part for part in profile["parts"]}
    assert set(parts) == set(Part)
    for part in parts.values():
        assert part["seconds"] == pytest.approx(sum(part["seconds_of_ranks"]) / 2)
        phases = part["forward_seconds"] + part["backward_seconds"]
        assert 0 <= phases <= part["seconds"] * (1 + 1e-9)
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(profile["seconds"])
    assert profile["tokens_per_rank"] == 8 * SEQ_LEN / 2


def test_a_run_too_short_to_measure_is_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, profile=True)
    with pytest.raises(ValueError, match=r"profile=true needs 13 steps .* leaves 6; choose more"):
        check_run(config, num_ranks=1)
    config.profile_steps = 0
    with pytest.raises(ValueError, match="profile_steps=0 must be at least 1"):
        check_run(config, num_ranks=1)
    check_steps(5, step=7, last=20)
    with pytest.raises(ValueError, match="schedule.steps=20 leaves 12"):
        check_steps(5, step=8, last=20)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_parts_flops_are_the_models(depth: int, tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    config.model = tiny_model(mtp=replace(config.model.mtp, depth=depth))
    whole = Documents(3 * SEQ_LEN, 3 * SEQ_LEN**2)
    work = work_of(config, whole, num_ranks=1)
    expected = 3 * SEQ_LEN * flops_per_token(config.model, seq_len=SEQ_LEN)
    assert sum(part.flops for part in work.values()) == pytest.approx(expected)
    assert work[Part.head].flops == 6 * 3 * SEQ_LEN * 512 * 32 * (1 + depth)
    halves = Documents(3 * SEQ_LEN, 6 * (SEQ_LEN / 2) ** 2)
    less = work[Part.attention].flops - work_of(config, halves, num_ranks=1)[Part.attention].flops
    pairs = 3 * (SEQ_LEN // 2) ** 2  # of tokens that no longer see each other
    assert less == pytest.approx(6 * config.model.attention.product_dims * 3 * pairs)


def test_the_bytes_of_what_moves_numbers_are_counted_once(tmp_path: Path) -> None:
    config: RunConfig = tiny_run(tmp_path)
    config.model = tiny_model(mtp=replace(config.model.mtp, depth=0))
    tokens = 3 * SEQ_LEN
    work = work_of(config, Documents(tokens, tokens * SEQ_LEN), num_ranks=1)
    widths = 32 + 3 * (2 * 32 + 16 + 16)
    assert work[Part.norms].bytes == 4 * tokens * widths * (2 + 3)
    rows = 4 * tokens * 32
    assert work[Part.dispatch].bytes == 2 * ((1 + 2 + 2 + 1) + (1 + 2 + 2 + 2 + 1)) * rows
