"""What a run's config says once it is settled, seen by later commands in other folders."""

from pathlib import Path
from unittest import mock

import pytest

from data.config import MixtureData
from launch import prepare, train
from launch.begin import settle
from launch.settings.compose import Job, run_jobs
from launch.settings.config import LaunchedRun
from tests.data.web_server import hold_port
from train.outcome import ExitCode


def test_local_sources_become_absolute_and_urls_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settled = []

    def keep(job: Job) -> ExitCode:
        settled.append(settle(job))
        return ExitCode.FINISHED

    near, far = "{name: near, folder: b/c, weight: 1}", "{name: far, folder: 's3://b/c', weight: 1}"
    command = ["thrifty train", "experiment=smoke", "data=mixture", "run_dir=run"]
    with mock.patch("sys.argv", [*command, f"data.sources=[{near},{far}]"]):
        run_jobs(keep, schema=LaunchedRun)
    (config,) = settled
    assert isinstance(config.data, MixtureData)
    assert [source.folder for source in config.data.sources] == [str(tmp_path / "b/c"), "s3://b/c"]
    assert config.data.folder == ""


def test_a_corpus_behind_a_url_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settled = []

    def keep(job: Job) -> ExitCode:
        settled.append(settle(job).data.folder)
        return ExitCode.FINISHED

    with mock.patch("sys.argv", ["thrifty train", "experiment=smoke", "data.folder='s3://b/c'"]):
        run_jobs(keep, schema=LaunchedRun)
    assert settled == ["s3://b/c"]


def test_a_server_that_is_away_at_the_start_is_a_failure_and_not_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    with hold_port() as port:  # where nobody listens
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        given = ["experiment=smoke", f"run_dir={tmp_path}/run", "data.retry.attempts=1"]
        for data in (
            [f"data.folder='{url}'"],
            ["data=mixture", f"data.sources=[{{name: a, folder: '{url}', weight: 1}}]"],
        ):
            monkeypatch.setattr("sys.argv", ["thrifty train", *given, *data])
            assert train.main() == ExitCode.FAILED
            assert f"{url}/manifest.json: " in capsys.readouterr().err


def test_nothing_is_prepared_behind_a_url(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["thrifty prepare", "data.folder='s3://b/c'"])
    assert prepare.main() == ExitCode.MISTAKE
    complaint = "data.folder=s3://b/c is a URL, but corpora are made in local folders; prepare it"
    assert complaint in capsys.readouterr().err
