"""A run that is killed anywhere and started again equals one that never stopped, bit for bit."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import train.checkpoint.checkpoints
import train.checkpoint.tensor_file
import train.update
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from train.checkpoint.checkpoints import Checkpoints
from train.config import RunConfig
from train.engine.engine import join
from train.journal import METRICS_FILE, read_records
from train.layout.parallel import ParallelConfig
from train.loop import train as train_run
from train.outcome import Outcome, Status
from train.precision import Dtype
from train.schedule import BatchRampConfig

NUMBERS = ("loss", "mtp_loss_1", "balance_loss", "grad_norm", "lr", "max_vio", "samples", "targets")


def start(config: RunConfig, num_ranks: int = 2) -> Outcome:
    """Run to the end, or to the death of a rank (an AssertionError)."""
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)

    def be_rank() -> Any:
        outcome = train_run(config, join(config.parallel, timeout_minutes=0.5))
        return outcome.status.value, outcome.step, outcome.summary

    status, step, summary = run_ranks(num_ranks, be_rank)[0]
    return Outcome(status=Status(status), step=step, summary=summary)


def read_steps(config: RunConfig) -> dict[int, dict[str, float]]:
    lines = (Path(config.run_dir) / METRICS_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if record["event"] == "step"]
    assert len({record["step"] for record in steps}) == len(steps), "a step is recorded twice"
    return {record["step"]: {key: record[key] for key in NUMBERS} for record in steps}


def same_files(one: RunConfig, other: RunConfig, step: int) -> bool:
    """Whether two runs' checkpoints of a step hold the same bytes."""
    names = [f"rank-{rank:05}.safetensors" for rank in range(2)]
    folders = [Path(c.run_dir) / "checkpoints" / f"step-{step:08}" for c in (one, other)]
    return all(
        (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names
    )


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> RunConfig:
    return with_folder(corpus, tmp_path)


def with_folder(corpus: Path, folder: Path) -> RunConfig:
    parallel = ParallelConfig(expert=2, micro_batch_size=2)
    config = tiny_run(folder, parallel=parallel)
    config.data.folder = str(corpus)
    return config


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two ranks, EP 2, accumulation 2, six steps, a checkpoint every two."""
    config = with_folder(corpus, tmp_path_factory.mktemp("undisturbed"))
    assert start(config).status is Status.finished
    return config


@contextmanager
def kill_at_call(
    module: Any, name: str, *, call: int, rank: int, before: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Patch a function so that its n-th call on one rank is kill -9 (after `before`, if given)."""
    real, calls = getattr(module, name), 0

    def maybe_die(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and os.environ["RANK"] == str(rank):
            if before is not None:
                before(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    with mock.patch.object(module, name, maybe_die):
        yield


@contextmanager
def signal_in_step(step: int, *, rank: int) -> Iterator[None]:
    """SIGTERM comes to one rank in the middle of a step."""
    real, calls = train.update.update, 0

    def update(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with mock.patch("train.loop.update", update):
        yield


def half_a_file(path: Path, tensors: Any, **about: Any) -> None:
    path.write_bytes(b"\x00" * 1000)


KILLS = {
    "rank 1 in step 4, before its backward pass": (train.update, "objective", 7, 1, None),
    "rank 0 in step 5, between update and bias": (train.update, "move_biases", 5, 0, None),
    "rank 1 in the middle of writing step 4": (
        train.checkpoint.checkpoints,
        "write_tensors",
        2,
        1,
        half_a_file,
    ),
    "rank 0 before the manifest of step 4": (
        train.checkpoint.checkpoints,
        "write_manifest",
        2,
        0,
        None,
    ),
    "rank 0 before the rename of step 4": (train.checkpoint.checkpoints, "sync_folder", 3, 0, None),
}


SLOW_KILLS = {
    "rank 1 in step 4, before its backward pass",
    "rank 0 before the manifest of step 4",
    "rank 0 before the rename of step 4",
}


@pytest.mark.parametrize(
    "kill", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW_KILLS)) for k in KILLS]
)
def test_a_killed_run_resumes_bit_for_bit(
    config: RunConfig, undisturbed: RunConfig, kill: str
) -> None:
    module, name, call, rank, before = KILLS[kill]
    with (
        kill_at_call(module, name, call=call, rank=rank, before=before),
        pytest.raises(AssertionError, match="exit codes"),
    ):
        start(config)
    assert start(config).status is Status.finished
    assert read_steps(config) == read_steps(undisturbed)
    assert same_files(config, undisturbed, step=6)
    leftovers = list((Path(config.run_dir) / "checkpoints").glob("*.partial"))
    assert leftovers == []


def test_sigterm_on_one_rank_saves_on_all_and_the_next_start_continues(
    config: RunConfig, undisturbed: RunConfig
) -> None:
    with signal_in_step(3, rank=1):
        outcome = start(config)
    assert (outcome.status, outcome.step) == (Status.interrupted, 3)
    assert Checkpoints(Path(config.run_dir), keep=10).steps() == [2, 3]
    assert start(config).status is Status.finished
    assert read_steps(config) == read_steps(undisturbed)
    assert same_files(config, undisturbed, step=6)


def slow_write(*args: Any, **kwargs: Any) -> Any:
    """Rank 1's disk takes longer than many steps."""
    if os.environ["RANK"] == "1":
        time.sleep(1.0)
    return train.checkpoint.tensor_file.write_tensors(*args, **kwargs)


def test_sigterm_while_a_save_is_in_flight_finishes_both(
    config: RunConfig, undisturbed: RunConfig
) -> None:
    with (
        mock.patch.object(train.checkpoint.checkpoints, "write_tensors", slow_write),
        signal_in_step(3, rank=0),
    ):
        outcome = start(config)
    assert (outcome.status, outcome.step) == (Status.interrupted, 3)
    assert Checkpoints(Path(config.run_dir), keep=10).steps() == [2, 3]
    assert start(config).status is Status.finished
    assert read_steps(config) == read_steps(undisturbed)
    assert same_files(config, undisturbed, step=6)


def test_kill_while_a_save_is_in_flight_goes_back_to_the_one_before(
    config: RunConfig, undisturbed: RunConfig, tmp_path: Path
) -> None:
    """Rank 0 dies in step 4, long after it has written its part of step 2."""
    dying = tmp_path / "dying"

    def write_after_the_death(*args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + 50
        while os.environ["RANK"] == "1" and not dying.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        return train.checkpoint.tensor_file.write_tensors(*args, **kwargs)

    def announce(*_: Any, **__: Any) -> None:
        dying.touch()

    with (
        mock.patch.object(train.checkpoint.checkpoints, "write_tensors", write_after_the_death),
        kill_at_call(train.update, "move_biases", call=4, rank=0, before=announce),
        pytest.raises(AssertionError, match="exit codes"),
    ):
        start(config)
    assert Checkpoints(Path(config.run_dir), keep=10).steps() == []
    assert start(config).status is Status.finished
    assert read_steps(config) == read_steps(undisturbed)
    assert same_files(config, undisturbed, step=6)


def test_a_run_that_waits_for_its_saves_writes_the_same_bytes(
    config: RunConfig, undisturbed: RunConfig
) -> None:
    config.checkpoint.asynchronous = False
    start(config)
    assert read_steps(config) == read_steps(undisturbed)
    folders = [Path(c.run_dir) / "checkpoints/step-00000006" for c in (config, undisturbed)]
    one, other = (
        load_file(folder / f"rank-0000{rank}.safetensors") for folder in folders for rank in "0"
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_killed_run_in_bf16_with_a_batch_ramp_and_a_skipped_step_resumes_bit_for_bit(
    corpus: Path, tmp_path: Path
) -> None:
    """Rank 1's gradients are not a number in step 2; kill -9 strikes in step 4."""
    ramp = BatchRampConfig(start=4, steps=4, increment=4)
    configs = [with_folder(corpus, tmp_path / name) for name in ("undisturbed", "killed")]
    for config in configs:
        config.precision.dtype = Dtype.bf16
        config.schedule.batch_ramp = ramp
    real = train.update.update

    def poisoned(engine: Any, batches: Any, over: Any, **kwargs: Any) -> Any:
        if over.sequences == 4 and poisoned.calls == 1 and os.environ["RANK"] == "1":
            weight = engine.model.norm.weight
            weight.register_hook(lambda grad: grad * float("nan"))
        poisoned.calls += 1
        return real(engine, batches, over, **kwargs)

    poisoned.calls = 0
    for config in configs:
        config.schedule.steps = 2
        with mock.patch("train.loop.update", poisoned):
            poisoned.calls = 0
            start(config)
        config.schedule.steps = 6
    start(configs[0])
    with (
        kill_at_call(train.update, "move_biases", call=3, rank=0),
        pytest.raises(AssertionError, match="exit codes"),
    ):
        start(configs[1])
    start(configs[1])
    assert read_steps(configs[1]) == read_steps(configs[0])
    assert [step["samples"] for step in read_steps(configs[0]).values()] == [4, 8, 16, 24, 32, 40]
    assert same_files(configs[1], configs[0], step=6)
    last = read_records(Path(configs[1].run_dir), event="step")[-1]
    assert last["skipped"] == 1


def test_a_finished_run_started_again_does_nothing(undisturbed: RunConfig) -> None:
    before = read_steps(undisturbed)
    outcome = start(undisturbed)
    assert (outcome.status, outcome.step) == (Status.finished, 6)
    assert read_steps(undisturbed) == before


@pytest.mark.parametrize(
    ("num_ranks", "expert"),
    [(2, 1), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1, 1), (4, 4)))],
)
def test_another_layout_continues_the_run(
    config: RunConfig, undisturbed: RunConfig, num_ranks: int, expert: int
) -> None:
    """The door that the checkpoint's logical names keep open: losses to 1e-5 after the change."""
    config.schedule.steps = 4
    start(config)
    config.schedule.steps = 6
    config.parallel = ParallelConfig(expert=expert, micro_batch_size=2)
    start(config, num_ranks)
    got, expected = read_steps(config), read_steps(undisturbed)
    for step in (5, 6):
        assert got[step]["samples"] == expected[step]["samples"]
        assert got[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)


def test_a_checkpoint_cut_short_is_named_and_the_one_before_it_used(
    config: RunConfig, undisturbed: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config.schedule.steps = 5
    start(config)
    damaged = Path(config.run_dir) / "checkpoints/step-00000005/rank-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    config.schedule.steps = 6
    log_file = Path(config.run_dir) / "log"
    with mock.patch("train.checkpoint.checkpoints.log.warning", writes_to(log_file)):
        assert start(config).status is Status.finished
    assert "step 5 is damaged" in log_file.read_text()
    assert str(damaged) in log_file.read_text()
    assert read_steps(config) == read_steps(undisturbed)


def writes_to(path: Path) -> Callable[..., None]:
    """A stand-in for a log's method that forked ranks can report through."""

    def write(message: str, *args: Any) -> None:
        with path.open("a") as file:
            file.write(message % args + "\n")

    return write
