"""Locks that the system lifts when the process that holds them ends, however it does."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hold_lock(path: Path, *, waits: bool) -> Iterator[None]:
    """While entered, no other process or thread holds the lock at `path`.

    Raises:
        BlockingIOError: Another one does, and this one doesn't wait.
    """
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        yield
