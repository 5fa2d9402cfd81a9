"""A stopwatch that at any moment runs for exactly one part, so that parts sum to the whole."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from train.hardware import wait_for
from train.profile.parts import Part


class Phase(StrEnum):
    forward = "forward"
    backward = "backward"  # what is computed again there included
    around = "around"  # neither


class Label(NamedTuple):
    part: Part
    phase: Phase


START = Label(Part.other, Phase.around)

Seconds = Mapping[Label, float]
"""How long each label ran."""


class Stopwatch:
    """Which label ran from when to when. On a GPU the times are those at which its stream came by:
    marks are events, and nothing waits for them before `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[Label, Any]] = []
        self.label = START

    def start(self) -> None:
        self._marks.clear()
        self.switch(START)

    def switch(self, label: Label) -> None:
        """From now on the time is this label's."""
        self.label = label
        self._marks.append((label, self._now()))

    @contextmanager
    def within(self, part: Part, phase: Phase | None = None) -> Iterator[Label]:
        """While entered, the time is this part's, in the phase that is going on unless one is
        given. What happens within MTP stays MTP's."""
        outer = self.label
        if phase is not None:
            label = Label(part, phase)
        elif outer.part is Part.mtp:
            label = outer
        else:
            label = Label(part, outer.phase)
        self.switch(label)
        try:
            yield label
        finally:
            self.switch(outer)

    def timing(self, function: Callable[..., Any], part: Part, phase: Phase) -> Callable[..., Any]:
        """The function, within that part and phase."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.within(part, phase):
                return function(*args, **kwargs)

        return timed

    def stop(self) -> Seconds:
        """Seconds of every label since the start. Waits for the device."""
        self.switch(START)
        wait_for(self._device)
        seconds: dict[Label, float] = defaultdict(float)
        for (label, start), (_, end) in pairwise(self._marks):
            seconds[label] += self._between(start, end)
        return dict(seconds)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        # Of one stream, whichever the caller works on: else the marks would have no order.
        event.record(torch.cuda.default_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return end - start
        return start.elapsed_time(end) / 1000
