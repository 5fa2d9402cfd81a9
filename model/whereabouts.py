"""What this process is doing right now, for whoever asks why it does not go on.

Every wait for other ranks, for data or for a disk is entered here by name; the watchdog
(`train/watch/watchdog.py`) reads it from its own thread. `python -m bench.watchdog` measures its
cost.
"""

import threading
import time
from contextlib import ContextDecorator
from typing import Any


class Activity(ContextDecorator):
    """Entered by whoever waits, and listed while it lasts. A class by hand: no generator runs."""

    __slots__ = ("detail", "here", "is_collective", "name", "number", "place", "since")

    def __init__(
        self, here: "Whereabouts", name: str, place: str, *, is_collective: bool, detail: Any
    ) -> None:
        self.here = here
        self.name = name  # dispatch, combine, gradient reduction, data wait, checkpoint, ...
        self.place = place  # the layer, where there is one
        self.is_collective = is_collective  # others must come here too
        self.detail: dict[str, Any] = detail  # sizes, counts
        self.number = 0  # of this process's collectives so far, this one included
        self.since = 0.0  # time.monotonic()

    def __enter__(self) -> "Activity":
        here = self.here
        if not here.is_left_out():
            here.number += self.is_collective
            self.number, self.since = here.number, time.monotonic()
            here.stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.here.is_left_out():
            self.here.stack.remove(self)


class Whereabouts:
    """A stack: an activity within another one is the one that waits."""

    def __init__(self) -> None:
        self.step = 0
        self.number = 0  # collectives entered so far
        self.stack: list[Activity] = []
        self._aside = threading.local()

    def doing(
        self, name: str, place: str = "", *, is_collective: bool = True, **detail: Any
    ) -> Activity:
        """While entered, this is where the process is."""
        return Activity(self, name, place, is_collective=is_collective, detail=detail)

    def leave_out_this_thread(self) -> None:
        """What the calling thread does beside training holds nothing up."""
        self._aside.is_set = True

    def is_left_out(self) -> bool:
        """Whether the calling thread is."""
        return getattr(self._aside, "is_set", False)

    def innermost(self) -> Activity | None:
        """Where the process is; None between entries, that is, computing."""
        stack = self.stack.copy()
        return stack[-1] if stack else None

    def has(self, name: str) -> bool:
        """Whether an activity of that name is going on, perhaps with others within."""
        return any(entry.name == name for entry in self.stack.copy())


HERE = Whereabouts()
"""This process's own."""
