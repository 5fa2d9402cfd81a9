"""A checkpoint that any layout wrote continues under any other: bit-equal state, equal losses."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from tests.train.trained import gather_state
from train.checkpoint import Checkpoints
from train.config import RunConfig
from train.engine import join
from train.journal import read_records
from train.loop import train
from train.parallel import Offload, ParallelConfig
from train.precision import Dtype
from train.ranks import alone
from train.run import Run
from train.stored_tensors import StoredTensors

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "1 rank, ZeRO 2": (1, {"zero_stage": 2}),
    "1 rank, ZeRO 3": (1, {"zero_stage": 3}),
    "2 ranks": (2, {}),
    "2 ranks, EP 2": (2, {"expert": 2}),
    "2 ranks, EP 2, ZeRO 2": (2, {"expert": 2, "zero_stage": 2}),
    "2 ranks, ZeRO 3": (2, {"zero_stage": 3}),
    "2 ranks, EP 2, ZeRO 3": (2, {"expert": 2, "zero_stage": 3}),
    "2 ranks, offload": (2, {"offload_optimizer": Offload.cpu}),
    "2 ranks, sequence 2": (2, {"sequence": 2}),
    "2 ranks, pipeline 2": (2, {"pipeline": 2}),
    "4 ranks": (4, {}),
    "4 ranks, EP 2": (4, {"expert": 2}),
    "4 ranks, EP 4, ZeRO 2": (4, {"expert": 4, "zero_stage": 2}),
}
PAIRS = list(permutations(LAYOUTS, 2))
DEFAULT = [("2 ranks, EP 2", "1 rank, ZeRO 3")]
BEFORE, AFTER = 2, 20


def laid_out(config: RunConfig, layout: str, *, steps: int) -> RunConfig:
    _, settings = LAYOUTS[layout]
    parallel = ParallelConfig(micro_batch_size=2, **settings)
    return replace(config, parallel=parallel, schedule=replace(config.schedule, steps=steps))


def start(config: RunConfig, layout: str) -> None:
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    run_ranks(
        LAYOUTS[layout][0], lambda: train(config, join(config.parallel, timeout_minutes=1)).step
    )


def losses(config: RunConfig) -> list[float]:
    records = read_records(Path(config.run_dir), event="step")
    return [record["loss"] for record in records if record["step"] > BEFORE]


def fresh(folder: Path, corpus: Path, layout: str, dtype: Dtype = Dtype.fp32) -> RunConfig:
    config = tiny_run(folder)
    config.data.folder = str(corpus)
    config.precision.dtype = dtype
    config.evaluation.every = config.checkpoint.every = 1000
    start(laid_out(config, layout, steps=BEFORE), layout)
    return config


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of runs that never changed their layout, each made when it is asked for."""
    return {}


def reference(
    undisturbed: dict[str, list[float]], layout: str, corpus: Path, folder: Path
) -> list[float]:
    if layout not in undisturbed:
        config = fresh(folder / "undisturbed", corpus, layout)
        start(laid_out(config, layout, steps=BEFORE + AFTER), layout)
        undisturbed[layout] = losses(config)
    return undisturbed[layout]


def loaded_state(config: RunConfig, layout: str) -> dict[str, torch.Tensor]:
    """What the ranks own after a load, put together."""

    def be_rank() -> dict[str, torch.Tensor]:
        ranks = join(config.parallel, timeout_minutes=1)
        return gather_state(Run(config, ranks).engine, ranks)

    return run_ranks(LAYOUTS[layout][0], be_rank)[0]


def stored_state(config: RunConfig) -> dict[str, torch.Tensor]:
    checkpoints = Checkpoints(Path(config.run_dir))
    manifest = checkpoints.choose(alone(), step=BEFORE)
    stored = StoredTensors(checkpoints.path(BEFORE), manifest)
    shapes = {name: t.shape for name, t in manifest.tensors.items() if not name.startswith("rng/")}
    return {
        name: stored.read(name, start=0, shape=shape).flatten() for name, shape in shapes.items()
    }


def check_pair(
    old: str, new: str, undisturbed: dict[str, list[float]], corpus: Path, folder: Path
) -> None:
    config = fresh(folder, corpus, old)
    moved = laid_out(config, new, steps=BEFORE + AFTER)
    expected, got = stored_state(config), loaded_state(moved, new)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name].float(), expected[name]) for name in expected)
    start(moved, new)
    unchanged = reference(undisturbed, old, corpus, folder)
    assert losses(moved) == pytest.approx(unchanged, rel=1e-5)


@pytest.mark.parametrize(("old", "new"), DEFAULT)
def test_another_layout_loads_the_same_state_and_goes_on(
    undisturbed: dict[str, list[float]], corpus: Path, tmp_path: Path, old: str, new: str
) -> None:
    check_pair(old, new, undisturbed, corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [pair for pair in PAIRS if pair not in DEFAULT])
def test_every_layout_loads_what_every_other_wrote(
    undisturbed: dict[str, list[float]], corpus: Path, tmp_path: Path, old: str, new: str
) -> None:
    check_pair(old, new, undisturbed, corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout_goes_on_bit_for_bit(
    undisturbed: dict[str, list[float]], corpus: Path, tmp_path: Path, layout: str
) -> None:
    config = tiny_run(tmp_path / "whole")
    config.data.folder = str(corpus)
    config.evaluation.every = config.checkpoint.every = 1000
    start(laid_out(config, layout, steps=BEFORE + AFTER), layout)
    assert losses(config) == reference(undisturbed, layout, corpus, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (Dtype.fp32, Dtype.bf16),
        pytest.param(Dtype.bf16, Dtype.fp32, marks=pytest.mark.slow),
    ],
)
def test_another_precision_keeps_masters_and_moments_to_the_bit(
    corpus: Path, tmp_path: Path, old: Dtype, new: Dtype
) -> None:
    config = fresh(tmp_path, corpus, "2 ranks, EP 2", old)
    config.precision.dtype = new
    moved = laid_out(config, "1 rank", steps=BEFORE + 1)
    expected, got = stored_state(config), loaded_state(moved, "1 rank")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name].float(), expected[name]) for name in expected)
