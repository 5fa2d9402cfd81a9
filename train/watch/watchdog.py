"""Each rank's watchdog: notices that no step ends, tells why, and ends the rank.

A thread that wakes every few seconds; the training thread only notes when a step has ended.
"""

import logging
import math
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Self

from model.whereabouts import HERE
from train.outcome import ExitCode
from train.ranks import Ranks
from train.watch.data_waits import DataWaits, Wait
from train.watch.stall import (
    ATTEMPT_VARIABLE,
    HEARTBEATS,
    explain,
    read_statements,
    stall_folder,
    take_statement,
    withdraw_statement,
    write_explanation,
    write_statement,
)

log = logging.getLogger(__name__)

REMEMBERED_STEPS = 50
# What takes long by right: these have a limit of their own.
SLOW_ACTIVITIES = ("start", "evaluation", "checkpoint")


@dataclass(slots=True, kw_only=True)
class WatchdogConfig:
    #: A step that takes this many times the usual is taken for a stall; 0 turns the watchdog off.
    factor: float = 10.0
    #: Seconds that a step may take in any case.
    min_seconds: float = 40.0
    #: Seconds that the start, an evaluation or a checkpoint may take.
    max_pause_seconds: float = 1800.0
    #: Seconds between signs of life in the run's folder.
    heartbeat_seconds: float = 5.0
    #: Seconds that a rank which noticed waits for the others' words.
    gather_seconds: float = 10.0


def check_watchdog(config: WatchdogConfig) -> None:
    """Refuse, with a ValueError, limits that every step exceeds."""
    if config.factor != 0 and config.factor < 2:
        raise ValueError(
            f"watchdog.factor={config.factor} would end healthy runs; choose at least 2, or 0 for "
            "no watchdog"
        )
    for name in ("min_seconds", "max_pause_seconds", "heartbeat_seconds", "gather_seconds"):
        if getattr(config, name) <= 0:
            raise ValueError(f"watchdog.{name}={getattr(config, name)} must be positive")


class Watchdog:
    """While entered, watches this rank."""

    def __init__(
        self, config: WatchdogConfig, *, run_dir: Path, ranks: Ranks, data_seconds: float = 0.0
    ) -> None:
        """`data_seconds` is how long a rank may wait for data of which nothing comes."""
        self.config = config
        self._data_seconds = data_seconds
        self._data_waits = DataWaits(
            run_dir, rank=ranks.rank, heartbeat_seconds=config.heartbeat_seconds
        )
        self._data_came = -math.inf  # time.monotonic()
        self.run_dir = run_dir
        self.ranks = ranks
        attempt = int(os.environ.get(ATTEMPT_VARIABLE, "0"))
        self._stall_folder = stall_folder(run_dir, attempt=attempt)
        self._durations: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._last_step = time.monotonic()
        self._is_over = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def note_step(self, step: int) -> None:
        """A step has ended (called by the training thread)."""
        now = time.monotonic()
        is_first = not self._durations
        self._durations.append(now - self._last_step)
        self._last_step = now
        HERE.step = step + 1
        if is_first and self.config.factor:
            self._say_that_it_lives()  # at once: the launcher times how long a start takes

    def note_pause(self) -> None:
        """Something else than a step has ended: the next step's time counts from here."""
        self._last_step = time.monotonic()

    def limit(self) -> float:
        """Seconds without an end of a step after which this is a stall."""
        if not self._durations or any(HERE.has(name) for name in SLOW_ACTIVITIES):
            return self.config.max_pause_seconds
        return max(self.config.min_seconds, self.config.factor * median(self._durations))

    def __enter__(self) -> Self:
        if self.config.factor:
            # An earlier start of the same number (`thrifty train` counts none) may have stalled.
            withdraw_statement(self._stall_folder, self.ranks.rank)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(self.config.heartbeat_seconds):
            self._say_that_it_lives()
            if time.monotonic() - self._last_step > self.limit() and not self._waits_for_data():
                self._explain()
                os._exit(ExitCode.STALLED)  # the training thread can't be woken

    def _waits_for_data(self) -> bool:
        """Whether no step ends because some rank waits for data, or did so until just now."""
        wait = self._data_waits.look(self._data_seconds + self.limit())
        if wait is Wait.on:
            self._data_came = time.monotonic()  # from when on the step has its own time
        is_recent = time.monotonic() - self._data_came <= self.limit()
        return wait is Wait.on or (wait is Wait.none and is_recent)

    def _say_that_it_lives(self) -> None:
        with self._one_at_a_time:
            words = take_statement(self.ranks.rank, with_stacks=False)
            write_statement(self.run_dir / HEARTBEATS, words)

    def _explain(self) -> None:
        """Say where this rank is; the first of those that speak says what it comes to."""
        folder = self._stall_folder
        write_statement(folder, take_statement(self.ranks.rank, with_stacks=True))
        deadline = time.monotonic() + self.config.gather_seconds
        said = read_statements(folder)
        while len(said) < self.ranks.count and time.monotonic() < deadline:
            time.sleep(0.2)
            said = read_statements(folder)
        if self.ranks.rank == min(said, default=self.ranks.rank):
            last_words = read_statements(self.run_dir / HEARTBEATS)
            explanation = explain(said, last_words, num_ranks=self.ranks.count)
            write_explanation(folder, explanation, said)
            log.error("no step has ended for %.0f s: %s", self.limit(), explanation.summary)
        else:
            time.sleep(1.0)  # or its exit would end the one that still writes
