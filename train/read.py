"""Reading a step's samples, and what becomes of the run when they can't be read."""

from collections.abc import Sequence
from typing import NamedTuple

from data.batches import Batch, Batches
from data.position import Position
from train.ranks import Ranks


class DataError(Exception):
    """Samples could not be read on at least one rank; the run is saved where it stood."""

    def __init__(self, message: str, *, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = list(ranks)  # those that could not read


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


def refuse_failures(failure: str | None, ranks: Ranks) -> None:
    """Stop a run, on all ranks, whose data can't be read.

    Raises:
        DataError: Some rank's failure.
    """
    failures = {rank: text for rank, text in enumerate(ranks.gather(failure)) if text is not None}
    if failures:
        listed = "; ".join(f"rank {rank}: {text}" for rank, text in failures.items())
        raise DataError(
            f"the data can't be read ({listed}); the run is saved and goes on from there: mend the "
            "file system or put the file back, and start the same command again",
            ranks=list(failures),
        )
