"""How far a long stage of work is: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 5.0

Advance = Callable[[int], None]
"""Told the number of bytes that were finished since it was last called."""


class Progress(Protocol):
    """Shows one stage after another."""

    def stage(self, name: str, *, total_bytes: int | None) -> AbstractContextManager[Advance]:
        """A stage of so many bytes of text; None where that is not known beforehand."""
        ...


class TerminalProgress:
    """A live bar with rate and remaining time."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, *, total_bytes: int | None) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console) as bar:
            task = bar.add_task(name, total=total_bytes)
            yield lambda num_bytes: bar.advance(task, num_bytes)


class LineProgress:
    """A line every few seconds and one at the end of each stage."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def stage(self, name: str, *, total_bytes: int | None) -> Iterator[Advance]:
        start = last_line = time.monotonic()
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done, last_line
            done += num_bytes
            now = time.monotonic()
            if now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                self._write(name, done, total_bytes, now - start)

        self._stream.write(f"{name} ...\n")
        yield advance
        self._stream.write(f"{name}: {done / 1e6:.1f} MB in {time.monotonic() - start:.1f} s\n")
        self._stream.flush()

    def _write(self, name: str, done: int, total: int | None, seconds: float) -> None:
        rate = done / seconds
        line = f"{name}: {done / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
        if total is not None and rate > 0:
            line += f", {done / total:.0%}, about {max(total - done, 0) / rate:.0f} s left"
        self._stream.write(line + "\n")
        self._stream.flush()


def open_progress() -> Progress:
    """Progress on stderr, live where that is a terminal."""
    console = Console(stderr=True)
    return TerminalProgress(console) if console.is_terminal else LineProgress(sys.stderr)
