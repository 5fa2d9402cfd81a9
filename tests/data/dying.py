"""A prepare that is killed in the middle of a stage, for scripts run in a process of their own."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from data.progress import Advance


class Dying:
    """Progress that kills its process with the `shards`-th finished shard of a stage."""

    def __init__(self, stage: str, *, shards: int) -> None:
        self._stage, self._shards = stage, shards

    @contextmanager
    def stage(self, name: str, *, total_bytes: int | None) -> Iterator[Advance]:
        finished = 0

        def advance(_num_bytes: int) -> None:
            nonlocal finished
            finished += 1
            if name == self._stage and finished == self._shards:
                os.kill(os.getpid(), signal.SIGKILL)

        yield advance
