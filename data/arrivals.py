"""When something last came from behind a URL, whichever thread waited for it.

Who waits for data must be given up when nothing comes, not while it comes slowly: the watchdog
(`train/watch/watchdog.py`) asks here.
"""

import time


class Arrivals:
    """The last time that bytes came."""

    def __init__(self) -> None:
        self._last: float | None = None  # time.monotonic()

    def note(self) -> None:
        """Something has come."""
        self._last = time.monotonic()

    def seconds_ago(self) -> float | None:
        """Since something came; None where nothing ever did."""
        return None if self._last is None else time.monotonic() - self._last


ARRIVALS = Arrivals()
"""This process's own."""
