"""SIGTERM and Ctrl-C as a wish that the loop asks for, not as an exception inside a step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether the run was asked to stop; being asked again changes nothing."""

    def __init__(self) -> None:
        self.is_requested = False

    def note(self) -> None:
        self.is_requested = True


@contextmanager
def on_stop_signal(handle: Callable[[], None]) -> Iterator[None]:
    """While entered, SIGTERM and SIGINT call `handle` and do nothing else."""

    def call(_number: int, _frame: FrameType | None) -> None:
        handle()

    previous = {number: signal.signal(number, call) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
