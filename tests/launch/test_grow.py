"""`thrifty grow` as a user types it, and a run of two ranks that goes on from what it wrote."""

import sys
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest

from data.prepare import prepare
from launch.config import LaunchedRun, LocalLaunch
from launch.grow import main
from launch.run_folder import prepare_folder
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from train.checkpoint import Checkpoints
from train.config import CONFIG_FILE, read_config, write_config
from train.engine import join
from train.journal import read_records
from train.loop import train
from train.manifest import Origin, read_manifest
from train.outcome import ExitCode
from train.parallel import ParallelConfig


def start(config: LaunchedRun) -> int:
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    write_config(config, Path(config.run_dir) / CONFIG_FILE)
    return run_ranks(2, lambda: train(config, join(config.parallel, timeout_minutes=1)).step)[0]


def grow(*arguments: str) -> ExitCode:
    with mock.patch.object(sys, "argv", ["thrifty grow", *arguments]):
        return main()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LaunchedRun:
    """Two ranks, EP 2, two steps, with an average of the weights."""
    parallel = ParallelConfig(expert=2, micro_batch_size=4)
    tiny = tiny_run(tmp_path_factory.mktemp("source"), parallel=parallel)
    values = {f.name: getattr(tiny, f.name) for f in fields(tiny)}
    config = LaunchedRun(**values, launch=LocalLaunch(processes=2))
    config.schedule.steps = 2
    config.ema.decay = 0.9
    prepare(config.data)
    start(config)
    return config


def test_a_run_goes_on_with_more_experts_where_it_stood(
    source: LaunchedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    code = grow(
        f"from={source.run_dir}",
        f"run_dir={new}",
        *("model.moe.num_experts=16", "model.moe.top_k=4", "schedule.steps=4"),
        *("grow.max_error=1e-5", "grow.noise=0"),
    )
    output = capsys.readouterr().out
    assert code == ExitCode.FINISHED
    assert output.index("logits change by") < output.index("checkpoint "), "told before it wrote"
    assert "changed           model.moe.num_experts: 8 -> 16" in output
    assert f"continue with     thrifty train run_dir={new}" in output
    config = read_config(new / CONFIG_FILE, LaunchedRun)
    assert (config.model.moe.num_experts, config.launch.processes) == (16, 2)
    assert config.data == source.data
    manifest = read_manifest(Checkpoints(new).path(2))
    assert manifest.parent is not None
    assert manifest.parent[:3] == (Origin.grown, source.run_dir, 2)
    assert manifest.changes["model.moe.top_k"] == [2, 4]
    assert start(config) == 4
    steps = read_records(new, event="step")
    assert [(record["step"], record["samples"]) for record in steps] == [(3, 24), (4, 32)]
    assert (
        read_manifest(Checkpoints(new).path(4)).tensors["ema/layers.1.ffn.experts.up"].shape[0]
        == 16
    )


def test_a_change_that_is_too_large_writes_nothing(
    source: LaunchedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = grow(
        f"from={source.run_dir}",
        f"run_dir={tmp_path / 'new'}",
        *("model.moe.num_experts=4", "grow.max_error=1e-5"),
    )
    assert code == ExitCode.MISTAKE
    captured = capsys.readouterr()
    assert "logits change by" in captured.out
    assert "more than grow.max_error=1e-05; nothing was written" in captured.err
    assert Checkpoints(tmp_path / "new").steps() == []
    assert not (tmp_path / "new" / CONFIG_FILE).exists()


def test_data_and_seed_stay_those_of_the_run(source: LaunchedRun, tmp_path: Path) -> None:
    settings = (f"from={source.run_dir}", f"run_dir={tmp_path / 'new'}", "model.moe.num_experts=16")
    assert grow(*settings, "seed=3") == ExitCode.MISTAKE


def test_a_resumption_with_other_expert_counts_names_the_command(source: LaunchedRun) -> None:
    config = read_config(Path(source.run_dir) / CONFIG_FILE, LaunchedRun)
    config.model.moe.num_experts = 16
    with pytest.raises(
        ValueError, match=r"thrifty grow from=.* run_dir=NEW model.moe.num_experts=16 makes a new"
    ):
        prepare_folder(config)
