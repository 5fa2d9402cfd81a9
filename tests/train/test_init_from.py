"""A run that starts from another run's weights, and a context that is extended that way."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from model.rope import RopeConfig, RopeScaling
from tests.ranks import run_ranks
from tests.train.tiny import SEQ_LEN, tiny_model, tiny_run
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import read_manifest
from train.checkpoint.restore import check_start, restore
from train.config import CONFIG_FILE, RunConfig, check_run, write_config
from train.engine.engine import join
from train.evaluate_run import EvaluateConfig, evaluate_run
from train.journal import read_records
from train.layout.parallel import ParallelConfig
from train.loop import train as train_run
from train.ranks import alone
from train.run import Run
from train.schedule import ChangeConfig, ChangesConfig, ConstantSchedule

NUM_EVALUATED = 40


def start(config: RunConfig, num_ranks: int = 1) -> None:
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, run_dir / CONFIG_FILE)
    run_ranks(num_ranks, lambda: train_run(config, join(config.parallel, timeout_minutes=5)).step)


@pytest.fixture(scope="module")
def source(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that two ranks have trained with EP 2."""
    parallel = ParallelConfig(expert=2, micro_batch_size=4)
    config = tiny_run(tmp_path_factory.mktemp("source"), parallel=parallel)
    config.data.folder = str(corpus)
    start(config, 2)
    return config


def extended(source: RunConfig, folder: Path) -> RunConfig:
    """The source continued with YaRN from 16 to 64 tokens, in a step that changes nothing."""
    rope = RopeConfig(
        scaling=RopeScaling.yarn, factor=4.0, original_seq_len=SEQ_LEN, mscale_all_dim=1.0
    )
    config = tiny_run(folder, model=tiny_model(rope=rope), init_from=source.run_dir)
    config.data = replace(source.data, seq_len=4 * SEQ_LEN)
    frozen = ChangesConfig(bias_update_speed=ChangeConfig(steps=[0], values=[0.0]))
    config.schedule = ConstantSchedule(steps=1, batch_size=8, peak_lr=1e-30, changes=frozen)
    config.evaluation.every = 1
    config.evaluation.max_sequences = NUM_EVALUATED
    return config


def measure(config: RunConfig) -> float:
    """The loss of a run's checkpoint, by as many threads as a rank has."""
    asked = EvaluateConfig(run_dir=config.run_dir, max_sequences=NUM_EVALUATED)
    return run_ranks(1, lambda: evaluate_run(asked).loss)[0]


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    return restore(Path(run_dir), ranks=alone()).model.state_dict()


def test_an_extended_run_starts_where_the_sources_weights_stand(
    source: RunConfig, tmp_path: Path
) -> None:
    config = extended(source, tmp_path)
    start(config)
    step = read_records(Path(config.run_dir), event="step")[0]
    assert (step["step"], step["samples"]) == (1, 8)
    own = read_records(Path(config.run_dir), event="evaluation")[-1]

    # The source's weights under the same RoPE and length, evaluated without any training.
    stretched = replace(source, model=config.model, data=config.data)
    stretched.run_dir = str(tmp_path / "stretched")
    Path(stretched.run_dir).mkdir()
    (Path(stretched.run_dir) / "checkpoints").symlink_to(Path(source.run_dir) / "checkpoints")
    write_config(stretched, Path(stretched.run_dir) / CONFIG_FILE)
    assert own["loss"] == pytest.approx(measure(stretched), rel=1e-6)
    assert own["loss"] != pytest.approx(measure(source), rel=1e-4)


def test_weights_are_taken_and_moments_and_position_are_not(
    source: RunConfig, tmp_path: Path
) -> None:
    config = extended(source, tmp_path)
    Path(config.run_dir).mkdir()

    def first_state() -> dict[str, torch.Tensor]:
        run = Run(config, join(config.parallel, timeout_minutes=5))
        assert (run.progress.step, run.progress.samples, run.progress.updates) == (0, 0, 0)
        assert all(state["step"] == 0 for state in run.engine._optimizer.state.values())
        for fragment in run.engine.fragments():
            assert fragment.name.startswith(("weight/", "buffer/")) or not fragment.data.any()
        return run.engine.model.state_dict()

    got, expected = run_ranks(1, first_state)[0], weights(source.run_dir)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert any(expected[name].any() for name in got if name.endswith("router.bias"))


def test_a_started_run_continues_from_its_own_checkpoint(source: RunConfig, tmp_path: Path) -> None:
    config = extended(source, tmp_path)
    start(config)
    config.schedule.steps = 2
    config.init_from = str(tmp_path / "gone")
    check_start(config)
    start(config)
    records = read_records(Path(config.run_dir), event="step")
    assert [record["step"] for record in records] == [1, 2]


def test_a_source_without_moments_is_enough(source: RunConfig, tmp_path: Path) -> None:
    """What an import leaves: weights and biases only."""
    config = extended(source, tmp_path)
    folder = Checkpoints(Path(source.run_dir), keep=1).path(6)
    manifest = read_manifest(folder)
    tensors = manifest.tensors
    manifest.tensors = {name: tensors[name] for name in tensors if "exp_avg" not in name}
    assert len(manifest.tensors) < len(tensors)
    Path(config.run_dir).mkdir()
    with mock.patch("train.checkpoint.checkpoints.read_manifest", return_value=manifest):
        run_ranks(1, lambda: Run(config, join(config.parallel, timeout_minutes=5)).progress.step)


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, init_from=str(tmp_path))
    with pytest.raises(ValueError, match=r"init_from=.* holds no checkpoint; give the folder"):
        check_start(config)


def test_its_own_folder_is_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    config.init_from = config.run_dir
    with pytest.raises(ValueError, match=r"init_from=.* is run_dir itself"):
        check_run(config, num_ranks=1)


def test_a_source_of_other_sizes_is_refused_by_the_tensor_that_differs(
    source: RunConfig, tmp_path: Path
) -> None:
    config = extended(source, tmp_path)
    config.model.moe.num_experts = 16
    Path(config.run_dir).mkdir()
    with pytest.raises(AssertionError, match=r"router.bias has shape \[8\] in step 6's .* \[16\]"):
        start(config)
