"""Whether a run stands still because some rank waits for its data, which has patience of its own.

A rank that waits for samples tries again and again (`data/retry.py`), and the others wait for it in
their next collective. Its heartbeats say that it does, and how long nothing has come from behind a
URL. The other ranks take its word for it while its heartbeats go on.
"""

import time
from enum import Enum, auto
from pathlib import Path

from train.watch.stall import (
    DATA_WAIT,
    HEARTBEATS,
    Statement,
    read_last_words,
    read_statements,
    take_statement,
)

MISSED_HEARTBEATS = 4  # after so many without a sign a rank does not wait but is gone


class Wait(Enum):
    """How it stands with the ranks that wait for data."""

    none = auto()  # no rank does
    on = auto()  # one does, and may
    over = auto()  # those that do wait in vain, or say no more


class DataWaits:
    """What a rank's watchdog knows of the ranks that wait for data."""

    def __init__(self, run_dir: Path, *, rank: int, heartbeat_seconds: float) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._missed_seconds = MISSED_HEARTBEATS * heartbeat_seconds
        self._heard: dict[int, tuple[float, float]] = {}  # what was said when, and when we saw it
        self._waiting: list[int] = []  # ranks that did when they were last asked

    def look(self, patience: float) -> Wait:
        """Whether some rank waits for data and has not waited for `patience` seconds in which
        nothing came. Asked only of a run that stands still: it may read all ranks' files."""
        said = {rank: words for rank in self._waiting if (words := self._read(rank)) is not None}
        if not _waiting_in(said):
            said = self._read_all()
        waiting = _waiting_in(said)
        self._waiting = list(waiting)
        if not waiting:
            return Wait.none
        alive = [words for words in waiting.values() if self._is_alive(words)]
        if any(_silence(words) < patience for words in alive):
            return Wait.on
        if alive:  # perhaps for a copy that another rank of its node makes while it computes
            others = self._read_all().values()
            if any(_is_served(words, patience) and self._is_alive(words) for words in others):
                return Wait.on
        return Wait.over

    def _read(self, rank: int) -> Statement | None:
        if rank == self._rank:  # its own words need no file
            return take_statement(rank, with_stacks=False)
        return read_last_words(self._run_dir, rank=rank)

    def _read_all(self) -> dict[int, Statement]:
        own = take_statement(self._rank, with_stacks=False)
        return {**read_statements(self._run_dir / HEARTBEATS), self._rank: own}

    def _is_alive(self, words: Statement) -> bool:
        """Whether the rank has said something new lately, by this node's clock."""
        said, seen = self._heard.get(words.rank, (None, 0.0))
        if said != words.time:
            seen = time.monotonic()
            self._heard[words.rank] = words.time, seen
        return time.monotonic() - seen < self._missed_seconds


def _waiting_in(said: dict[int, Statement]) -> dict[int, Statement]:
    return {rank: words for rank, words in said.items() if words.activity == DATA_WAIT}


def _silence(words: Statement) -> float:
    """Seconds in which nothing came while the rank waited."""
    return words.seconds if words.silence is None else min(words.seconds, words.silence)


def _is_served(words: Statement, patience: float) -> bool:
    """Whether something has come to the rank within that time."""
    return words.silence is not None and words.silence < patience
