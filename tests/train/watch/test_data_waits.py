"""A run that waits for data is left its patience; one that stands still otherwise is not."""

import time
from pathlib import Path

import pytest

from data.arrivals import Arrivals
from model.whereabouts import HERE
from tests.ranks import run_ranks
from train.ranks import connect
from train.watch import stall
from train.watch.data_waits import DataWaits, Wait
from train.watch.stall import (
    COMPUTING,
    DATA_WAIT,
    HEARTBEATS,
    Statement,
    stall_folder,
    write_statement,
)
from train.watch.watchdog import Watchdog, WatchdogConfig


@pytest.fixture(autouse=True)
def _nothing_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "ARRIVALS", Arrivals())  # other tests of this process had some


def say(run_dir: Path, rank: int, activity: str, **more: object) -> None:
    words = {"host": "h", "pid": 1, "step": 3, "time": time.time(), "seconds": 50.0, **more}
    write_statement(run_dir / HEARTBEATS, Statement(rank=rank, activity=activity, **words))  # type: ignore[arg-type]


def test_a_rank_may_wait_for_data_as_long_as_its_patience_lasts(tmp_path: Path) -> None:
    waits = DataWaits(tmp_path, rank=0, heartbeat_seconds=600.0)
    assert waits.look(60.0) is Wait.none
    say(tmp_path, 1, COMPUTING)
    assert waits.look(60.0) is Wait.none
    say(tmp_path, 1, DATA_WAIT)
    assert waits.look(60.0) is Wait.on
    assert waits.look(40.0) is Wait.over
    say(tmp_path, 1, DATA_WAIT, seconds=500.0, silence=2.0)
    assert waits.look(40.0) is Wait.on, "it comes slowly"
    say(tmp_path, 1, DATA_WAIT, seconds=500.0)
    say(tmp_path, 2, "dispatch", silence=2.0)
    assert waits.look(40.0) is Wait.on, "rank 2 makes the copy that rank 1 waits for"
    say(tmp_path, 1, "dispatch")
    assert waits.look(40.0) is Wait.none


def test_a_rank_that_says_no_more_is_not_waited_for(tmp_path: Path) -> None:
    waits = DataWaits(tmp_path, rank=0, heartbeat_seconds=0.01)
    say(tmp_path, 1, DATA_WAIT)
    assert waits.look(60.0) is Wait.on
    time.sleep(0.1)
    assert waits.look(60.0) is Wait.over
    say(tmp_path, 1, DATA_WAIT)
    assert waits.look(60.0) is Wait.on


def test_a_rank_knows_its_own_wait_without_files(tmp_path: Path) -> None:
    waits = DataWaits(tmp_path / "not there", rank=0, heartbeat_seconds=600.0)
    with HERE.doing(DATA_WAIT, is_collective=False):
        assert waits.look(60.0) is Wait.on
        time.sleep(0.01)
        assert waits.look(0.005) is Wait.over


@pytest.mark.slow
def test_ranks_outlive_a_wait_for_data_that_is_longer_than_a_step_may_take(tmp_path: Path) -> None:
    quick = WatchdogConfig(factor=2.0, min_seconds=3.0, heartbeat_seconds=0.2, gather_seconds=2.0)

    def wait() -> int:
        ranks = connect(timeout_minutes=1)
        with Watchdog(quick, run_dir=tmp_path, ranks=ranks, data_seconds=60.0) as watchdog:
            for step in range(1, 4):
                watchdog.note_step(step)
            if ranks.rank == 1:
                with HERE.doing(DATA_WAIT, is_collective=False):
                    time.sleep(8.0)
            ranks.wait()
            time.sleep(1.0)  # what remains of the step: its own limit holds again
            watchdog.note_step(4)
        return ranks.rank

    assert run_ranks(2, wait) == [0, 1]
    assert not stall_folder(tmp_path, attempt=0).exists()
