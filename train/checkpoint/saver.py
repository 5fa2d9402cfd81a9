"""Saving beside training: a step waits for a copy into host memory, a thread writes it.

The threads of all ranks agree among themselves, over a group of their own, that every part is on
disk: neither the training's collectives nor its loop are touched. At most one save is in flight.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

from model.whereabouts import HERE
from train.checkpoint.checkpoints import Checkpoints, Written
from train.checkpoint.manifest import Fragment
from train.checkpoint.snapshot import Snapshot
from train.ranks import Ranks

log = logging.getLogger(__name__)

# After a failure the other ranks' threads may still finish the save that is in flight; if one
# of them is gone they can't, and this rank must not stay for it.
LINGER_SECONDS = 60.0


class Saved(NamedTuple):
    written: Written
    seconds: float  # from the beginning of the copy until all was on disk


class Saver:
    """Writes a run's checkpoints, one at a time; leaving it waits for the one in flight."""

    def __init__(
        self, checkpoints: Checkpoints, ranks: Ranks, *, snapshot: Snapshot | None
    ) -> None:
        """With a snapshot saves happen beside training; without one `start` writes itself."""
        self._checkpoints = checkpoints
        self._ranks = ranks.beside() if snapshot is not None else ranks
        self._snapshot = snapshot
        self._save: _Save | None = None

    @property
    def step(self) -> int | None:
        """The step whose save is in flight, the same on all ranks; None where there is none."""
        return self._save.step if self._save is not None else None

    def has_ended(self) -> bool:
        """Whether this rank's part of the save in flight is over, well or not."""
        return self._save is not None and not self._save.is_alive()

    def start(self, step: int, fragments: Iterable[Fragment], about: Mapping[str, Any]) -> None:
        """Begin a save; returns once training may change the state again. One at a time."""
        assert self._save is None, "the save before it must be finished"
        began = time.perf_counter()
        taken = self._snapshot.take(fragments) if self._snapshot is not None else fragments

        def write() -> Saved:
            written = self._checkpoints.save(step, taken, ranks=self._ranks, about=about)
            return Saved(written, time.perf_counter() - began)

        self._save = _Save(step, write)
        if self._snapshot is not None:
            self._save.start()
        else:
            self._save.run()

    def finish(self) -> Saved:
        """Wait for the save in flight.

        Raises:
            SaveError: It failed, on all ranks.
        """
        assert self._save is not None, "a save is in flight"
        save, self._save = self._save, None
        return save.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if self._save is not None:
            log.warning("waiting for the checkpoint of step %d to be written", self._save.step)
            self._save.wait(LINGER_SECONDS if error is not None else None)


class _Save(threading.Thread):
    def __init__(self, step: int, write: Callable[[], Saved]) -> None:
        super().__init__(name=f"save-{step}", daemon=True)  # a dead peer must not keep us alive
        self.step = step
        self._write = write
        self._saved: Saved | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        if self.ident == threading.get_ident():
            HERE.leave_out_this_thread()
        try:
            self._saved = self._write()
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float | None) -> None:
        if self.ident is not None:  # it was run beside training
            self.join(seconds)

    def result(self) -> Saved:
        self.wait(None)
        if self._error is not None:
            raise self._error
        assert self._saved is not None, "it ended without an error"
        return self._saved
