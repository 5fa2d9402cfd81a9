"""A secret in a URL is refused before it is written anywhere, and is not repeated."""

import json
from pathlib import Path

import fsspec
import pytest

from data.blend import SourceConfig
from data.config import (
    DataConfig,
    FilesData,
    HubData,
    MixtureData,
    StdlibData,
    TokenizedData,
    check_data,
)
from data.credentials import refuse_credentials
from data.prepare import Prepared, prepare
from data.retry import RetryConfig
from data.tokenizer import TokenizerConfig
from launch import prepare as prepare_command
from tests.data.web_server import serve
from train.evaluate_run import EvaluateConfig, evaluate_run
from train.outcome import ExitCode

SECRET = "hunter2"
WITH_SECRET = [
    f"https://user:{SECRET}@host/corpus",
    f"https://{SECRET}@host/corpus",
    f"https://user:{SECRET}/more@host/corpus",
    f"HTTPS://host/corpus?token={SECRET}",
    f"https://host?X-Amz-Signature={SECRET}",
    f"https://host:8080/corpus#{SECRET}",
    f"s3://key:{SECRET}@bucket/corpus",
    f"sftp://user:{SECRET}@host/corpus",
    f"simplecache::s3://key:{SECRET}@bucket/corpus",
]


@pytest.mark.parametrize("url", WITH_SECRET)
def test_a_secret_in_a_url_is_refused_with_its_key_and_a_way_out_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.folder is a URL .* AWS_ACCESS_KEY_ID") as told:
        check_data(StdlibData(folder=url))
    assert SECRET not in str(told.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/corpora/web",
        "https://host:8080/corpora/web",
        "http://[::1]:8080/corpora",
        "abfs://container@account.dfs.core.windows.net/corpus",
        "hf://datasets/org/name@main/corpus",
        "corpora/of?one letter#more",
    ],
)
def test_places_without_a_secret_pass(url: str) -> None:
    refuse_credentials("data.folder", url)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (
            MixtureData(sources=[SourceConfig(name="a", folder=WITH_SECRET[0], weight=1)]),
            r"data\.sources\[0\]\.folder",
        ),
        (StdlibData(folder="f", tokenizer=TokenizerConfig(path=WITH_SECRET[0])), "data.tokenizer"),
        (FilesData(folder="f", paths=["a", WITH_SECRET[3]]), r"data\.paths"),
        (
            TokenizedData(folder="f", paths=["a"], validation_paths=[WITH_SECRET[4]]),
            r"data\.validation_paths",
        ),
        (HubData(folder="f", name=WITH_SECRET[1]), r"data\.name"),
    ],
)
def test_every_key_that_may_hold_a_url_is_looked_at(config: DataConfig, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}.* is a URL") as told:
        check_data(config)
    assert SECRET not in str(told.value)


def test_another_corpus_to_be_judged_by_is_looked_at_too() -> None:
    with pytest.raises(ValueError, match="^corpus is a URL"):
        evaluate_run(EvaluateConfig(run_dir="none", corpus=WITH_SECRET[0]))


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_command_with_a_secret_leaves_no_trace_of_it(
    sweep: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A sweep writes down what it was asked before any of its runs is checked."""
    monkeypatch.chdir(tmp_path)
    given = [*sweep, "run_dir=run", f"data.folder='{WITH_SECRET[0]}'"]
    monkeypatch.setattr("sys.argv", ["thrifty prepare", "experiment=smoke", *given])
    with pytest.raises(SystemExit) as ended:
        prepare_command.main()
    assert ended.value.code == ExitCode.MISTAKE
    captured = capfd.readouterr()
    assert "data.folder is a URL" in captured.err
    assert SECRET not in captured.out + captured.err
    assert list(tmp_path.rglob("*")) == []


def test_credentials_that_fsspec_is_configured_with_open_the_corpus(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    with serve(prepared.folder) as web:
        web.wants = ("Authorization", f"Bearer {SECRET}")
        patience = RetryConfig(attempts=1)
        config = FilesData(folder=web.url, paths=["not looked at"], retry=patience)
        with pytest.raises(OSError, match="401"):
            prepare(config)
        settings = {"client_kwargs": {"headers": {"Authorization": f"Bearer {SECRET}"}}}
        fsspec.config.set_conf_env(conf := {}, {"FSSPEC_HTTP": json.dumps(settings)})
        monkeypatch.setitem(fsspec.config.conf, "http", conf["http"])
        assert prepare(config).manifest == prepared.manifest
    secret = SECRET.encode()
    assert not any(secret in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
