"""What this process is doing right now, for whoever asks why it does not go on.

Every wait for other ranks, for data or for a disk is entered here by name; the watchdog
(`train/watchdog.py`) reads it from its own thread. An entry costs about a microsecond.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Activity(NamedTuple):
    name: str  # dispatch, combine, gradient reduction, data wait, checkpoint, ...
    place: str  # the layer, where there is one
    is_collective: bool  # others must come here too
    number: int  # of this process's collectives so far, this one included
    detail: dict[str, Any]  # sizes, counts
    since: float  # time.monotonic()


class Whereabouts:
    """A stack: an activity within another one is the one that waits."""

    def __init__(self) -> None:
        self.step = 0
        self._stack: list[Activity] = []
        self._number = 0
        self._aside = threading.local()

    @contextmanager
    def doing(
        self, name: str, place: str = "", *, is_collective: bool = True, **detail: Any
    ) -> Iterator[None]:
        """While entered, this is where the process is."""
        if getattr(self._aside, "is_set", False):
            yield
            return
        self._number += is_collective
        entry = Activity(name, place, is_collective, self._number, detail, time.monotonic())
        self._stack.append(entry)
        try:
            yield
        finally:
            self._stack.remove(entry)

    def leave_out_this_thread(self) -> None:
        """What the calling thread does beside training holds nothing up."""
        self._aside.is_set = True

    @property
    def number(self) -> int:
        """Collectives entered so far."""
        return self._number

    def innermost(self) -> Activity | None:
        """Where the process is; None between entries, that is, computing."""
        stack = self._stack.copy()
        return stack[-1] if stack else None

    def has(self, name: str) -> bool:
        """Whether an activity of that name is going on, perhaps with others within."""
        return any(entry.name == name for entry in self._stack.copy())


HERE = Whereabouts()
"""This process's own."""
