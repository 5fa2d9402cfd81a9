"""Locks that the system lifts when the process that holds them ends, however it does."""

import fcntl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.failure import ReadError, is_lasting

LASTS, PASSES = "lasts", "passes"


@contextmanager
def hold_lock(path: Path, *, waits: bool) -> Iterator[None]:
    """While entered, no other process or thread holds the lock at `path`.

    Raises:
        BlockingIOError: Another one does, and this one doesn't wait.
    """
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        yield


@contextmanager
def take_turn(path: Path) -> Iterator[None]:
    """As `hold_lock`, for what one does for all: whoever waited while another one failed at it
    has failed too, instead of trying as long once more.

    The lock's file holds the last failure, with a mark by which it is told from those before.

    Raises:
        ReadError: The one that this one waited for failed.
    """
    with open(path, "a+b") as file:
        before = _read(path)
        fcntl.flock(file, fcntl.LOCK_EX)
        now = _read(path)
        if now != before and now.count("\n") >= 2:  # else it was killed while it noted that
            _, how, text = now.split("\n", 2)
            raise ReadError(text, is_lasting=how == LASTS)
        try:
            yield
        except OSError as error:
            note = f"{uuid.uuid4().hex}\n{LASTS if is_lasting(error) else PASSES}\n{error}"
            with suppress(OSError):  # where the disk is full, the others notice that at once
                path.write_text(note)
            raise


def _read(path: Path) -> str:
    return path.read_text(errors="replace")
