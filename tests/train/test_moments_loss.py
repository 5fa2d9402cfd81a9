"""What storing moments in fewer bits costs in loss."""

from pathlib import Path
from statistics import mean

import pytest

from tests.command import thrifty
from tests.ranks import run_ranks
from tests.train.test_optimizer_resume import config_of, start, train_steps
from train.config import CONFIG_FILE, RunConfig, read_config
from train.journal import read_records
from train.optimizer.config import OptimizerConfig
from train.optimizer.moments import Moments


@pytest.mark.slow
@pytest.mark.parametrize("moments", [Moments.bf16, Moments.int8])
def test_thirty_small_steps_end_within_a_percent_of_fp32_moments(
    tmp_path: Path, moments: Moments
) -> None:
    def loss_with(kept: Moments) -> float:
        def be_rank() -> float:
            config = config_of(tmp_path, OptimizerConfig(moments=kept), ranks=1)
            engine, ranks = start(config)
            return mean(train_steps(engine, ranks, config, range(30))[-5:])

        return run_ranks(1, be_rank, seconds=600)[0]

    assert loss_with(moments) == pytest.approx(loss_with(Moments.fp32), rel=0.01)


@pytest.mark.slow
def test_the_demo_ends_within_a_percent_of_fp32_moments(tmp_path: Path) -> None:
    """The mean of three seeds: a single pair differs by as much as any two runs do."""
    settings = (
        "experiment=demo",
        "seed=0,1,2",
        "optimizer=adamw,adamw_bf16",
        "checkpoint.every=1000",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )
    code, output = thrifty("train", "-m", *settings, cwd=tmp_path, seconds=3600)
    assert code == 0, output
    losses: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for run_dir in sorted((tmp_path / "sweep").glob("[0-9]*")):
        moments = read_config(run_dir / CONFIG_FILE, RunConfig).optimizer.moments
        losses[moments].append(read_records(run_dir, event="evaluation")[-1]["loss"])
    assert [len(of_kind) for of_kind in losses.values()] == [3, 3]
    assert mean(losses["bf16"]) == pytest.approx(mean(losses["fp32"]), rel=0.01)
