"""A rank that waits for nobody's coming says so and ends; one that works is left alone."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from model.whereabouts import HERE
from tests.ranks import run_ranks
from train.ranks import alone, connect
from train.watch.stall import (
    explain,
    read_explanation,
    read_last_words,
    read_statements,
    stall_folder,
    take_statement,
    write_explanation,
    write_statement,
)
from train.watch.watchdog import Watchdog, WatchdogConfig, check_watchdog

QUICK = WatchdogConfig(
    factor=2.0, min_seconds=1.0, max_pause_seconds=60.0, heartbeat_seconds=0.2, gather_seconds=2.0
)


def take_steps(watchdog: Watchdog) -> None:
    for step in range(1, 4):
        time.sleep(0.01)
        watchdog.note_step(step)


def kill_after_the_other(folder: Path) -> None:
    """SIGKILL for rank 1, which is stopped, once rank 0 has gone."""
    while not all((folder / name).exists() for name in ("pid-0", "pid-1")):
        time.sleep(0.1)
    first, stopped = (int((folder / name).read_text()) for name in ("pid-0", "pid-1"))
    while psutil.pid_exists(first):
        time.sleep(0.1)
    os.kill(stopped, signal.SIGKILL)


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_the_one_that_waits_for_it(tmp_path: Path) -> None:
    patient = replace(QUICK, min_seconds=5.0, gather_seconds=5.0)

    def train() -> None:
        ranks = connect(timeout_minutes=1)
        pid = tmp_path / f"pid-{ranks.rank}.partial"
        pid.write_text(str(os.getpid()))
        pid.rename(pid.with_suffix(""))
        with Watchdog(patient, run_dir=tmp_path, ranks=ranks) as watchdog:
            take_steps(watchdog)
            time.sleep(0.5)  # heartbeats
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            with HERE.doing("dispatch", "layers.1.ffn", sent=[1, 2]):
                dist.barrier()

    threading.Thread(target=kill_after_the_other, args=(tmp_path,), daemon=True).start()
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[76, -9\]"):
        run_ranks(2, train, seconds=120)
    found = read_explanation(tmp_path, attempt=0)
    assert found is not None
    assert found.missing == [1]
    assert "rank 0 waits in dispatch of layers.1.ffn, step 4" in found.summary
    text = (tmp_path / "stalls" / "start-0000" / "explanation.md").read_text()
    assert "dist.barrier()" in text, "the stack shows where it waits"
    assert "sent [1, 2]" in text


@pytest.mark.slow
def test_a_rank_that_takes_steps_is_left_alone_for_longer_than_one_may_take(
    tmp_path: Path,
) -> None:
    patient = replace(QUICK, min_seconds=3.0)  # a busy machine may stop this process for a second
    with Watchdog(patient, run_dir=tmp_path, ranks=alone()) as watchdog:
        for step in range(1, 9):
            time.sleep(0.5)
            watchdog.note_step(step)
    assert not (tmp_path / "stalls").exists()


def test_the_first_step_is_told_at_once_and_an_earlier_stall_is_forgotten(tmp_path: Path) -> None:
    folder = stall_folder(tmp_path, attempt=0)
    old = take_statement(0, with_stacks=False)
    write_statement(folder, old)
    write_explanation(folder, explain({0: old}, {}, num_ranks=2), {0: old})
    quiet = WatchdogConfig(heartbeat_seconds=600.0)
    with Watchdog(quiet, run_dir=tmp_path, ranks=alone()) as watchdog:
        assert read_explanation(tmp_path, attempt=0) is None
        assert read_statements(folder) == {}
        assert read_last_words(tmp_path, rank=0) is None
        watchdog.note_step(7)
        words = read_last_words(tmp_path, rank=0)
    assert words is not None
    assert words.step == 8


def test_a_step_may_take_a_multiple_of_the_usual_but_a_checkpoint_its_own_time(
    tmp_path: Path,
) -> None:
    config = WatchdogConfig(factor=10.0, min_seconds=0.1, max_pause_seconds=500.0)
    watchdog = Watchdog(config, run_dir=tmp_path, ranks=alone())
    assert watchdog.limit() == 500.0, "nothing is known before the first step"
    for step in range(3):
        time.sleep(0.05)
        watchdog.note_step(step)
    assert 0.5 <= watchdog.limit() < 5.0
    with HERE.doing("checkpoint"), HERE.doing("agreement on the host"):
        assert watchdog.limit() == 500.0


def test_factors_that_would_end_healthy_runs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"watchdog\.factor=1\.5 would end healthy runs"):
        check_watchdog(WatchdogConfig(factor=1.5))
    check_watchdog(WatchdogConfig(factor=0))
