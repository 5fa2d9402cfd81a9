"""A checkpoint that any layout wrote continues under any other: bit-equal state, equal losses."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import train.loop
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from tests.train.trained import gather_state
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.stored_tensors import StoredTensors
from train.config import RunConfig, check_run
from train.engine.engine import join
from train.journal import read_records
from train.layout.parallel import Offload, ParallelConfig
from train.optimizer.config import MuonConfig, OptimizerConfig
from train.precision import Dtype, PrecisionConfig
from train.ranks import Ranks, alone
from train.run import Run
from train.schedule import ConstantSchedule

HOST: dict[str, Any] = {"offload_optimizer": Offload.cpu}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "1 rank, ZeRO 0": (1, {"zero_stage": 0}),
    "1 rank, ZeRO 3": (1, {"zero_stage": 3}),
    "2 ranks": (2, {}),
    "2 ranks, EP 2": (2, {"expert": 2}),
    "2 ranks, EP 2, ZeRO 0": (2, {"expert": 2, "zero_stage": 0}),
    "2 ranks, EP 2, ZeRO 2": (2, {"expert": 2, "zero_stage": 2}),
    "2 ranks, ZeRO 3": (2, {"zero_stage": 3}),
    "2 ranks, EP 2, offload": (2, {"expert": 2, **HOST}),
    "2 ranks, EP 2, ZeRO 3, offload": (
        2,
        {"expert": 2, "zero_stage": 3, **HOST, "offload_parameters": Offload.cpu},
    ),
    "2 ranks, sequence 2": (2, {"sequence": 2}),
    "2 ranks, pipeline 2": (2, {"pipeline": 2}),
    "4 ranks": (4, {}),
    "4 ranks, EP 2, ZeRO 3": (4, {"expert": 2, "zero_stage": 3}),
    "4 ranks, EP 4, ZeRO 2": (4, {"expert": 4, "zero_stage": 2}),
    "4 ranks, EP 2, pipeline 2": (4, {"expert": 2, "pipeline": 2}),
}
PAIRS = list(product(LAYOUTS, LAYOUTS))
DEFAULT = ("2 ranks, EP 2", "1 rank, ZeRO 0")
BEFORE, AFTER = 2, 20
# Muon has one state per matrix, and knows neither ZeRO 3 nor offload (`train/layout/rules.py`).
# Its products run in fp32 here, for losses that can be compared.
MUON = MuonConfig(iterate_in=Dtype.fp32)
MUON_RING = [
    "1 rank, ZeRO 0",
    "4 ranks, EP 4, ZeRO 2",
    "2 ranks, pipeline 2",
    "2 ranks, EP 2",
    "1 rank, ZeRO 0",
]


class Saved(NamedTuple):
    """What a layout wrote after BEFORE steps, and how its run went on."""

    config: RunConfig
    state: dict[str, Tensor]
    losses: list[float]


class Moved(NamedTuple):
    """What another start made of it."""

    state: dict[str, Tensor]  # right after the load
    losses: list[float]


Save = Callable[[str, OptimizerConfig], Saved]
ADAMW = OptimizerConfig()


@pytest.fixture(scope="module")
def save(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Each layout's run is made once, when it is first asked for."""
    made: dict[tuple[str, str], Saved] = {}

    def save(layout: str, optimizer: OptimizerConfig) -> Saved:
        if (layout, optimizer.kind) not in made:
            folder = tmp_path_factory.mktemp("saved")
            made[layout, optimizer.kind] = run_and_save(folder, corpus, layout, optimizer)
        return made[layout, optimizer.kind]

    return save


def run_and_save(folder: Path, corpus: Path, layout: str, optimizer: OptimizerConfig) -> Saved:
    # At a higher rate near ties in routing come up within 20 steps: one token that chooses another
    # expert for a difference in the last bit changes the loss by more than 1e-5.
    schedule = ConstantSchedule(steps=BEFORE + AFTER, batch_size=8, peak_lr=1e-3)
    config = tiny_run(folder, optimizer=optimizer, schedule=schedule)
    config.data.folder = str(corpus)
    config.evaluation.every = 1000
    config.checkpoint.every, config.checkpoint.keep = BEFORE, AFTER
    config = lay_out(config, layout)
    start(config, LAYOUTS[layout][0])
    return Saved(config, stored_state(config), read_losses(config))


def move(saved: Saved, layout: str, folder: Path, **changes: Any) -> Moved:
    """Go on from the first checkpoint under another layout."""
    config = replace(saved.config, run_dir=str(folder / "run"), **changes)
    shutil.copytree(
        Checkpoints(Path(saved.config.run_dir)).path(BEFORE),
        Checkpoints(Path(config.run_dir)).path(BEFORE),
    )
    config = lay_out(config, layout)
    config.checkpoint = replace(config.checkpoint, every=1000)
    state = start(config, LAYOUTS[layout][0])
    return Moved(state, read_losses(config))


def lay_out(config: RunConfig, layout: str) -> RunConfig:
    num_ranks, settings = LAYOUTS[layout]
    parallel = ParallelConfig(micro_batch_size=2 if num_ranks == 4 else 4, **settings)
    config = replace(config, parallel=parallel)
    check_run(config, num_ranks=num_ranks)
    return config


def start(config: RunConfig, num_ranks: int) -> dict[str, Tensor]:
    """Run to the end; the state that the run began with, of all ranks together."""
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)

    def be_rank() -> dict[str, Tensor]:
        states = []

        def begin(config: RunConfig, ranks: Ranks) -> Run:
            run = Run(config, ranks)
            states.append(gather_state(run.engine, ranks))
            return run

        with mock.patch.object(train.loop, "Run", begin):
            train.loop.train(config, join(config.parallel, timeout_minutes=5))
        return states[0]

    return run_ranks(num_ranks, be_rank, seconds=300)[0]


def read_losses(config: RunConfig) -> list[float]:
    records = read_records(Path(config.run_dir), event="step")
    return [record["loss"] for record in records if record["step"] > BEFORE]


def stored_state(config: RunConfig) -> dict[str, Tensor]:
    checkpoints = Checkpoints(Path(config.run_dir))
    manifest = checkpoints.choose(alone(), step=BEFORE)
    stored = StoredTensors(checkpoints.path(BEFORE), manifest)
    shapes = {name: t.shape for name, t in manifest.tensors.items() if not name.startswith("rng/")}
    return {
        name: stored.read(name, start=0, shape=shape).flatten() for name, shape in shapes.items()
    }


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name].float(), tensor), name


def check_pair(saved: Saved, moved: Moved, *, is_same_layout: bool) -> None:
    assert_same_state(moved.state, saved.state)
    assert len(moved.losses) == AFTER
    if is_same_layout:
        assert moved.losses == saved.losses
    else:
        assert moved.losses == pytest.approx(saved.losses, rel=1e-5)


def test_another_layout_loads_the_same_state_and_goes_on(save: Save, tmp_path: Path) -> None:
    old, new = DEFAULT
    saved = save(old, ADAMW)
    check_pair(saved, move(saved, new, tmp_path), is_same_layout=False)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [pair for pair in PAIRS if pair != DEFAULT])
def test_every_layout_loads_what_every_other_wrote(
    save: Save, tmp_path: Path, old: str, new: str
) -> None:
    saved = save(old, ADAMW)
    check_pair(saved, move(saved, new, tmp_path), is_same_layout=old == new)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), pairwise(MUON_RING))
def test_muons_states_move_between_layouts_too(
    save: Save, tmp_path: Path, old: str, new: str
) -> None:
    saved = save(old, MUON)
    check_pair(saved, move(saved, new, tmp_path), is_same_layout=False)


@pytest.mark.slow
@pytest.mark.parametrize("new", LAYOUTS)
def test_another_precision_keeps_masters_and_moments_to_the_bit(
    save: Save, tmp_path: Path, new: str
) -> None:
    saved = save("2 ranks, EP 2", ADAMW)
    precision = PrecisionConfig(dtype=Dtype.bf16)
    assert_same_state(move(saved, new, tmp_path, precision=precision).state, saved.state)
