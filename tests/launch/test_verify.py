"""`thrifty verify` as a user runs it: real processes, from the command line to the verdict."""

from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest

import launch.verify
from launch.verify import VerifiedRun, settle
from tests.command import compose, thrifty
from train.config import CONFIG_FILE, write_config
from train.outcome import ExitCode, Outcome, Status
from train.precision import Dtype
from train.verify.config import VerifyConfig

TINY = ("experiment=smoke", "verify.steps=1")


@pytest.mark.slow
def test_a_layout_is_verified_on_as_many_processes_as_it_needs(tmp_path: Path) -> None:
    settings = ("launch.processes=2", "parallel=expert", "parallel.recompute=full")
    code, output = thrifty("verify", *TINY, *settings, cwd=tmp_path)
    assert code == ExitCode.FINISHED, output
    assert "VERIFIED" in output
    assert "the layout on 2" in output
    assert "routed experts" in output
    assert not list(tmp_path.iterdir()), "neither corpus nor run is made"


def test_a_run_is_verified_from_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compose(
        "experiment=smoke", "launch.processes=2", "parallel.expert=2", f"run_dir={tmp_path}"
    )
    write_config(run, tmp_path / CONFIG_FILE)
    asked = []

    def observe_nothing(config: VerifiedRun, folder: Path) -> Outcome:
        asked.append((config.launch.processes, config.parallel.expert, config.verify.full))
        return Outcome(status=Status.failed, step=0, reason="as told")

    monkeypatch.setattr(launch.verify, "observe", observe_nothing)
    with mock.patch("sys.argv", ["verify", f"run_dir={tmp_path}", "verify.full=true"]):
        assert launch.verify.main() == ExitCode.FAILED
    assert asked == [(2, 2, True)]


def test_a_folder_without_a_run_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch("sys.argv", ["verify", f"run_dir={tmp_path}"]):
        assert launch.verify.main() == ExitCode.MISTAKE
    assert f"{tmp_path}/{CONFIG_FILE}" in capsys.readouterr().err


def test_full_changes_nothing_but_the_precision() -> None:
    run = compose("experiment=smoke", "precision=bf16")
    values = {field.name: getattr(run, field.name) for field in fields(run)}
    given = VerifiedRun(**values, verify=VerifyConfig(full=True))
    config = settle(given)
    assert config.precision.dtype is Dtype.fp32
    assert config.model == given.model
    assert config.schedule == given.schedule


def test_in_bf16_one_step_is_compared() -> None:
    run = compose("experiment=smoke")
    values = {field.name: getattr(run, field.name) for field in fields(run)}
    config = settle(VerifiedRun(**values, verify=VerifyConfig(precision=Dtype.bf16)))
    assert config.precision.dtype is Dtype.bf16
    assert config.verify.steps == 1
