"""`thrifty grow` as a user types it, and a run of two ranks that goes on from what it wrote."""

import logging
import os
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest

from data.prepare import prepare
from launch.begin import begin
from launch.grow import main
from launch.grow_on_resume import STAGE, grow_on_resume, replaced
from launch.run_folder import prepare_folder
from launch.settings.config import LaunchedRun, LocalLaunch
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import Origin, read_manifest
from train.config import CONFIG_FILE, read_config, write_config
from train.engine.engine import join
from train.journal import read_records
from train.layout.parallel import ParallelConfig
from train.loop import train
from train.outcome import ExitCode


def start(config: LaunchedRun) -> int:
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    write_config(config, Path(config.run_dir) / CONFIG_FILE)
    return run_ranks(2, lambda: train(config, join(config.parallel, timeout_minutes=5)).step)[0]


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


@pytest.fixture
def resumed(source: LaunchedRun, tmp_path: Path) -> LaunchedRun:
    """The run's folder copied, and the config with which it is to grow there."""
    run_dir = tmp_path / "run"
    shutil.copytree(source.run_dir, run_dir)
    config = read_config(run_dir / CONFIG_FILE, LaunchedRun)
    config.run_dir, config.schedule.steps = str(run_dir), 4
    write_config(config, run_dir / CONFIG_FILE)
    config.model.moe.num_experts, config.model.moe.top_k = 16, 4
    config.grow.on_resume, config.grow.max_error = True, 1e-5
    return config


def experts(run_dir: Path) -> dict[str, int]:
    """How many experts each checkpoint of the folder has."""
    return {
        path.name: read_manifest(path).tensors["weight/layers.1.ffn.experts.up"].shape[0]
        for path in sorted((run_dir / "checkpoints").iterdir())
    }


def test_a_run_grows_in_its_own_folder_when_it_is_resumed_so(
    resumed: LaunchedRun, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with begin(resumed) as run_dir:
        assert experts(run_dir) == {"step-00000002": 16, "step-00000002.before-growth": 8}
    assert "logits change by" in caplog.text
    assert "model.moe.num_experts: 8 -> 16" in caplog.text
    manifest = read_manifest(Checkpoints(run_dir).path(2))
    assert manifest.parent is not None
    assert manifest.parent[:3] == (Origin.grown, str(run_dir), 2)
    assert manifest.parent.hash == read_manifest(replaced(Checkpoints(run_dir).path(2))).hash
    kept = read_config(run_dir / CONFIG_FILE, LaunchedRun)
    assert (kept.model.moe.num_experts, kept.grow.on_resume) == (16, False)
    with begin(resumed):  # the same command again
        assert experts(run_dir) == {"step-00000002": 16, "step-00000002.before-growth": 8}


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def die(*_: object, **__: object) -> None:
    raise Killed


def is_second(path: Path) -> bool:
    """Whether it is the grown checkpoint that is about to take its place."""
    return path.name == "step-00000002" and path.parent.parent.name == STAGE


def die_at_second(path: Path, target: Path) -> None:
    if is_second(path):
        raise Killed
    os.rename(path, target)


def die_after_second(path: Path, target: Path) -> None:
    os.rename(path, target)
    if is_second(path):
        raise Killed


KILLS = {
    "written": ("launch.grow_on_resume.write_config", die),
    "config written": ("launch.grow_on_resume.replaced", die),
    "one renamed": ("launch.grow_on_resume.Path.rename", die_at_second),
    "both renamed": ("launch.grow_on_resume.Path.rename", die_after_second),
}
LEFT = {
    "written": {"step-00000002": 8},
    "config written": {"step-00000002": 8},
    "one renamed": {"step-00000002.before-growth": 8},
    "both renamed": {"step-00000002": 16, "step-00000002.before-growth": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_a_growth_that_was_killed_is_finished_or_made_again(
    resumed: LaunchedRun, kill: str
) -> None:
    """Whatever was done already, the next start has one checkpoint of the config's model."""
    run_dir = Path(resumed.run_dir)
    with mock.patch(*KILLS[kill]), pytest.raises(Killed), begin(resumed):
        pass
    assert experts(run_dir) == LEFT[kill]
    assert (run_dir / STAGE / "checkpoints").is_dir()
    with begin(resumed):
        assert experts(run_dir) == {"step-00000002": 16, "step-00000002.before-growth": 8}
        assert not (run_dir / "growing").exists()
    assert start(read_config(run_dir / CONFIG_FILE, LaunchedRun)) == 4
    assert [record["step"] for record in read_records(run_dir, event="step")] == [1, 2, 3, 4]
    assert experts(run_dir)["step-00000004"] == 16


def test_growth_on_resume_changes_nothing_else(resumed: LaunchedRun) -> None:
    resumed.seed = 3
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed: 0 -> 3\)"):
        grow_on_resume(resumed)
    resumed.seed, resumed.model.dim = 0, 64
    with pytest.raises(ValueError, match=r"can't change model\.dim"):
        grow_on_resume(resumed)
    assert experts(Path(resumed.run_dir)) == {"step-00000002": 8}
