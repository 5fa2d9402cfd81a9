"""Reading a step's samples, and what becomes of the run when they can't be read."""

from collections.abc import Iterator
from typing import NamedTuple

from data.batches import Batch, Batches
from data.position import Position
from model.whereabouts import HERE
from train.ranks import Ranks
from train.watch.stall import DATA_WAIT


class DataError(Exception):
    """Samples could not be read on at least one rank."""

    def __init__(self, failures: dict[int, str], *, is_saved: bool = True) -> None:
        """`failures` are what happened on those ranks; a run that had begun is saved."""
        self.failures = failures
        self.ranks = list(failures)
        listed = "; ".join(f"rank {rank}: {text}" for rank, text in failures.items())
        super().__init__(
            f"the data can't be read ({listed}); "
            f"{'the run is saved and goes on from there: ' * is_saved}mend the "
            "file system or put the file back, and start the same command again"
        )


class Read(NamedTuple):
    """This rank's micro-batches and the position after them, or none and why."""

    batches: list[Batch]
    position: Position
    failure: str | None = None


def read(batches: Batches, position: Position, size: int) -> Read:
    """The next samples of this rank. A failure is noted: the other ranks must hear of it first."""
    try:
        return Read(*batches.take(position, size))
    except OSError as error:
        return Read([], position, failure=str(error))


def read_together(batches: Iterator[Batch], ranks: Ranks) -> Iterator[Batch]:
    """Equally many batches on every rank, each once all ranks have theirs: one that could not read
    would leave the others waiting for it in the model's exchanges.

    Raises:
        DataError: Some rank can't read; on all ranks.
    """
    while True:
        batch, failure = None, None
        try:
            with HERE.doing(DATA_WAIT, is_collective=False):
                batch = next(batches, None)
        except OSError as error:
            failure = str(error)
        if ranks.any(failure is not None):
            refuse_failures(failure, ranks)
        if batch is None:
            return
        yield batch


def refuse_failures(failure: str | None, ranks: Ranks, *, is_saved: bool = True) -> None:
    """Stop a run, on all ranks, whose data can't be read.

    Raises:
        DataError: Some rank's failure.
    """
    failures = {rank: text for rank, text in enumerate(ranks.gather(failure)) if text is not None}
    if failures:
        raise DataError(failures, is_saved=is_saved)
