"""What a run does when its numbers or its disk fail, and what it writes down."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import train.update
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from train.checkpoint.checkpoints import CheckpointConfig, Checkpoints, OnError
from train.checkpoint.manifest import read_manifest, write_manifest
from train.config import RunConfig
from train.engine.engine import join
from train.journal import read_records
from train.layout.parallel import ParallelConfig
from train.loop import train as train_run
from train.optimizer.config import OptimizerConfig
from train.schedule import ChangeConfig, ChangesConfig


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> RunConfig:
    parallel = ParallelConfig(expert=2, micro_batch_size=4)
    config = tiny_run(tmp_path, parallel=parallel)
    config.data.folder = str(corpus)
    Path(config.run_dir).mkdir()
    return config


def start(config: RunConfig) -> dict[str, Any]:
    def be_rank() -> dict[str, Any]:
        return train_run(config, join(config.parallel, timeout_minutes=5)).summary

    return run_ranks(2, be_rank)[0]


def poison(*, steps: set[int]) -> Any:
    """`objective`, but not a number in these steps, on rank 1 alone."""
    real, calls = train.update.objective, 0

    def objective(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        factor = float("nan") if calls in steps and os.environ["RANK"] == "1" else 1.0
        return real(*args) * factor

    return mock.patch.object(train.update, "objective", objective)


def test_a_step_without_finite_gradients_is_skipped_counted_and_shown(config: RunConfig) -> None:
    with poison(steps={3}):
        start(config)
    steps = {record["step"]: record for record in read_records(Path(config.run_dir), event="step")}
    assert [steps[step]["skipped"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert steps[3]["grad_norm"] is None
    assert all(steps[step]["loss"] < 7 for step in (4, 5, 6)), "the weights are not a number"


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_a_way_out(config: RunConfig) -> None:
    config.optimizer = OptimizerConfig(max_skipped_steps=2)
    with (
        poison(steps={2, 4, 5}),
        pytest.raises(AssertionError, match=r"of 2 steps in a row were not finite, up to step 5"),
    ):
        start(config)
    assert Checkpoints(Path(config.run_dir), keep=10).steps() == [2, 4]


def fail_to_write(path: Path) -> Any:
    raise OSError(28, "No space left on device", str(path))


@pytest.mark.parametrize("on_error", OnError)
def test_a_full_disk_stops_the_run_or_not_as_configured(
    config: RunConfig, on_error: OnError
) -> None:
    config.checkpoint = CheckpointConfig(every=2, on_error=on_error)
    real, calls = train.checkpoint.checkpoints.write_tensors, 0

    def write(path: Path, tensors: Any, **about: Any) -> Any:
        nonlocal calls
        calls += 1
        is_full = calls == 2 and os.environ["RANK"] == "1"
        return fail_to_write(path) if is_full else real(path, tensors, **about)

    checkpoints = Checkpoints(Path(config.run_dir), keep=10)
    with mock.patch("train.checkpoint.checkpoints.write_tensors", write):
        if on_error is OnError.stop:
            with pytest.raises(AssertionError, match="No space left on device"):
                start(config)
            assert checkpoints.steps() == [2]
        else:
            start(config)
            assert checkpoints.steps() == [2, 6]


def test_records_hold_what_a_person_watches(config: RunConfig) -> None:
    summary = start(config)
    run_dir = Path(config.run_dir)
    record = read_records(run_dir, event="step")[-1]
    expected = {"loss", "mtp_loss_1", "balance_loss", "grad_norm", "lr", "tokens_per_second"}
    expected |= {"flops_per_second", "mfu", "memory_bytes", "max_vio", "dead_experts", "samples"}
    assert expected <= record.keys()
    assert len(record["max_vio_per_layer"]) == 3
    evaluation = read_records(run_dir, event="evaluation")[-1]
    assert evaluation["loss"] == summary["validation_loss"]
    assert 0 < evaluation["unigram_entropy"] < 7
    assert {"parameters_total", "parameters_active", "tokens_per_second"} <= summary.keys()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(config: RunConfig) -> None:
    config.model.vocab_size = 100
    with pytest.raises(AssertionError, match=r"model.vocab_size=100 is smaller than the 512"):
        start(config)


def test_a_checkpoint_of_another_tokenizer_is_refused(config: RunConfig) -> None:
    start(config)
    folder = Path(config.run_dir) / "checkpoints/step-00000006"
    manifest = read_manifest(folder)
    manifest.tokenizer = "0" + manifest.tokenizer
    write_manifest(folder, manifest)
    config.schedule.steps = 7
    with pytest.raises(AssertionError, match="was trained with another tokenizer"):
        start(config)


def test_a_checkpoint_of_another_model_is_refused_by_the_tensor_that_differs(
    config: RunConfig,
) -> None:
    start(config)
    config.model.moe.num_experts = 16
    with pytest.raises(AssertionError, match=r"router.bias has shape \[8\] in step 6's .* \[16\]"):
        start(config)


def test_a_loss_weight_changes_at_its_step_and_not_before(
    config: RunConfig, tmp_path: Path
) -> None:
    config.schedule.steps = 2
    config.schedule.changes = ChangesConfig(mtp_loss_weight=ChangeConfig(steps=[1], values=[0.0]))
    start(config)
    changed = [record["grad_norm"] for record in read_records(Path(config.run_dir), event="step")]

    config.schedule.changes = ChangesConfig()
    norms = {}
    for weight in (0.3, 0.0):
        config.run_dir = str(tmp_path / f"weight-{weight}")
        Path(config.run_dir).mkdir()
        config.model.mtp.loss_weight = weight
        start(config)
        records = read_records(Path(config.run_dir), event="step")
        norms[weight] = [record["grad_norm"] for record in records]
    assert changed[0] == norms[0.3][0] != norms[0.0][0]
    assert changed[1] != norms[0.3][1]
