"""SIGTERM and Ctrl-C as a wish that the loop asks for, not as an exception inside a step."""

import signal
from types import FrameType, TracebackType
from typing import Self


class Interrupt:
    """While entered, a signal only notes that the run should stop; a second changes nothing."""

    def __init__(self) -> None:
        self.is_requested = False
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.is_requested = True
