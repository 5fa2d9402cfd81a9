"""A run whose data can't be read is saved where it stands, says what is wrong, and goes on."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import data.training_data
import train.run
from data.held_out import HeldOut, open_held_out
from data.retry import RetryConfig, longest_silence, retry
from data.token_stream import TokenStream
from tests.data.web_server import GONE, SILENT, serve
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from train.checkpoint.checkpoints import Checkpoints
from train.config import CONFIG_FILE, RunConfig, write_config
from train.engine.engine import join
from train.evaluate_run import EvaluateConfig, evaluate_run
from train.journal import read_records
from train.layout.parallel import ParallelConfig
from train.loop import train as train_run
from train.watch.watchdog import WatchdogConfig

CANT_READ = r"the data can't be read \(.*rank 1: .*00000\.bin.*the run is saved"


def start(config: RunConfig) -> list[Any]:
    return run_ranks(
        2, lambda: train_run(config, join(config.parallel, timeout_minutes=0.5)).status
    )


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> RunConfig:
    config = tiny_run(tmp_path, parallel=ParallelConfig(expert=2, micro_batch_size=4))
    config.data.folder = str(shutil.copytree(corpus, tmp_path / "corpus"))
    config.data.retry = RetryConfig(attempts=2, wait_seconds=0.01)
    Path(config.run_dir).mkdir()
    return config


def from_read(number: int, act: Any) -> Any:
    """Something happens before each of rank 1's reads from the `number`-th on."""
    read_rows, calls = data.training_data.read_rows, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number and os.environ["RANK"] == "1":
            act()
        return read_rows(*args, **kwargs)

    return mock.patch.object(data.training_data, "read_rows", counted)


def numbers(config: RunConfig) -> list[tuple[float, float, int]]:
    records = read_records(Path(config.run_dir), event="step")
    return [(record["loss"], record["grad_norm"], record["samples"]) for record in records]


def stop(config: RunConfig, act: Any) -> None:
    """Start a run of whose ranks one can't read on after three steps."""
    with from_read(4, act), pytest.raises(AssertionError, match=CANT_READ) as told:
        start(config)
    assert "DataError" in str(told.value)
    (*_, saved) = Checkpoints(Path(config.run_dir), keep=10).steps()
    assert saved == 3


def test_a_shard_that_vanishes_for_one_rank_stops_the_run_with_its_position_kept(
    config: RunConfig,
) -> None:
    def vanish() -> None:
        raise FileNotFoundError(2, "No such file or directory", "train-00000.bin")

    stop(config, vanish)


def test_held_out_text_that_one_rank_cannot_read_stops_all_with_the_step_saved(
    config: RunConfig,
) -> None:
    config.evaluation.every, config.checkpoint.every, config.schedule.steps = 2, 1000, 4
    read = TokenStream.read

    def read_or_fail(stream: TokenStream, start: int, stop: int) -> Any:
        if os.environ["RANK"] == "1":
            raise FileNotFoundError(2, "No such file or directory", "validation-00000.bin")
        return read(stream, start, stop)

    lost = r"can't be read \(rank 1: .*validation-00000\.bin.*the run is saved"
    with (
        mock.patch.object(TokenStream, "read", read_or_fail),
        pytest.raises(AssertionError, match=lost),
    ):
        start(config)
    assert Checkpoints(Path(config.run_dir), keep=10).steps() == [2]
    start(config)
    records = read_records(Path(config.run_dir), event="evaluation")
    assert [record["step"] for record in records] == list(range(2, config.schedule.steps + 1, 2))
    write_config(config, Path(config.run_dir) / CONFIG_FILE)
    most = config.evaluation.max_sequences
    asked = EvaluateConfig(run_dir=config.run_dir, step=2, max_sequences=most)
    (made_up,) = run_ranks(1, lambda: evaluate_run(asked).loss)
    assert records[0]["loss"] == pytest.approx(made_up, rel=1e-5)


def test_a_run_that_goes_on_with_other_held_out_text_says_so_and_evaluates_nothing_twice(
    config: RunConfig,
) -> None:
    config.evaluation.every, config.schedule.steps = 2, 2
    config.parallel = ParallelConfig(micro_batch_size=8)

    def go_on(fingerprint: str | None) -> str:
        def open_other(*args: Any, **kwargs: Any) -> HeldOut:
            found = open_held_out(*args, **kwargs)
            return found if fingerprint is None else found._replace(fingerprint=fingerprint)

        with (
            mock.patch.object(train.run, "open_held_out", open_other),
            mock.patch.object(train.run.log, "warning") as said,
        ):
            train_run(config, join(config.parallel, timeout_minutes=0.5))
        return str(said.call_args_list)

    for fingerprint, said_so in ((None, False), (None, False), ("other" * 4, True)):
        (told,) = run_ranks(1, partial(go_on, fingerprint))
        assert ("the held-out text is another one than before" in told) == said_so
    (evaluation,) = read_records(Path(config.run_dir), event="evaluation")
    assert evaluation["step"] == 2


@pytest.mark.slow
def test_a_run_whose_shard_was_cut_short_is_finished_by_a_rerun(
    config: RunConfig, tmp_path: Path
) -> None:
    shard = Path(config.data.folder) / "train-00000.bin"
    kept = shutil.copy(shard, tmp_path / "kept.bin")
    stop(config, lambda: os.truncate(shard, 100))
    shutil.copy(kept, shard)
    start(config)

    undisturbed = tiny_run(tmp_path / "undisturbed", parallel=config.parallel)
    undisturbed.data.folder = config.data.folder
    Path(undisturbed.run_dir).mkdir(parents=True)
    start(undisturbed)
    assert numbers(config) == numbers(undisturbed)


@pytest.mark.slow
def test_a_run_whose_server_goes_away_is_finished_by_a_rerun_and_judged_through_the_url(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    undisturbed = tiny_run(tmp_path / "undisturbed", parallel=config.parallel)
    undisturbed.data.folder = config.data.folder
    Path(undisturbed.run_dir).mkdir(parents=True)
    start(undisturbed)
    with serve(Path(config.data.folder)) as server:
        config.data.folder, config.data.cache_bytes = server.url, 0
        with (
            from_read(4, (server.folder / GONE).touch),
            pytest.raises(AssertionError, match=r"can't be read .*:\d+/train-00000\.bin"),
        ):
            start(config)
        (*_, saved) = Checkpoints(Path(config.run_dir), keep=10).steps()
        assert 2 <= saved <= 3
        (server.folder / GONE).unlink()
        start(config)
        assert numbers(config) == numbers(undisturbed)

        def judge(corpus: str) -> dict[str, float]:
            asked = EvaluateConfig(run_dir=undisturbed.run_dir, corpus=corpus)
            return run_ranks(1, lambda: evaluate_run(asked)._asdict())[0]

        write_config(undisturbed, Path(undisturbed.run_dir) / CONFIG_FILE)
        assert judge(server.url) == judge(str(server.folder))


@pytest.mark.slow
def test_a_run_whose_server_falls_silent_for_longer_than_a_step_may_take_is_saved(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    config.watchdog = WatchdogConfig(factor=2.0, min_seconds=4.0, heartbeat_seconds=0.3)
    config.data.retry = RetryConfig(attempts=3, wait_seconds=0.1, timeout_seconds=6.0)
    assert longest_silence(config.data.retry, is_remote=True) > 4 * config.watchdog.min_seconds
    with serve(Path(config.data.folder)) as server:
        config.data.folder, config.data.cache_bytes = server.url, 0
        with (
            from_read(4, (server.folder / SILENT).touch),
            pytest.raises(
                AssertionError, match=r"can't be read .*has not answered within 6 s"
            ) as told,
        ):
            start(config)
        assert "DataError" in str(told.value)
        assert server.asked["manifest.json"] == 2, "once by each rank"
        (*_, saved) = Checkpoints(Path(config.run_dir), keep=10).steps()
        assert 2 <= saved <= 3
        assert not (Path(config.run_dir) / "stalls").exists()


def test_a_failure_that_passes_is_only_a_warning(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    failures, forgotten = [OSError("stale file handle")] * 2, []

    def read() -> Sequence[int]:
        if failures:
            raise failures.pop()
        return [1]

    patience = RetryConfig(attempts=3, wait_seconds=0.001)
    assert retry(read, patience, forget=lambda: forgotten.append(1)) == [1]
    assert forgotten == [1, 1]
    assert "stale file handle (attempt 1 of 3; the next in 0.001 s)" in caplog.text
    assert "attempt 2 of 3; the next in 0.002 s" in caplog.text
    failures += [OSError("gone")] * 3
    with pytest.raises(OSError, match="gone"):
        retry(read, patience, forget=lambda: None)
