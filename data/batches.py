"""Which rank reads which samples, and the tensors that it gets.

A global batch is a range of samples. Its micro-batch m on rank r, of size b among W ranks, holds
the samples first + (m*W + r)*b + i for i in range(b): together the ranks read the range in order,
so the position of a run in its data is the same whatever W and b are.

B = micro_batch_size, S = seq_len.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, Self

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from data.mixture import Drawn
from data.position import Position
from data.rows import Rows, stack_rows
from data.samples import IGNORED, Sample, Samples


class SampleOrder(Protocol):
    """Says which samples follow a position, and reads them: a run's training data, or random
    ones (`thrifty verify`)."""

    def draw(self, position: Position, count: int) -> Drawn[Any]: ...

    def read(self, rows: Sequence[Any], batch_size: int) -> list[Rows]: ...


class Batch(NamedTuple):
    """One micro-batch of one rank, on the CPU."""

    tokens: Int64[Tensor, "B S"]
    targets: Int64[Tensor, "B S"]  # the next token, or IGNORED
    positions: Int64[Tensor, "B S"]
    is_real: Bool[Tensor, "B S"]  # False at padding
    document_lengths: list[int]  # attention segments in the order of [B*S]; none spans sequences

    def num_targets(self, depth: int = 0) -> int:
        """How many targets the prediction `depth` tokens further ahead has; 0 is the next token.

        The target of depth k at place t is targets[t + k], and counts if that is still in the
        sequence and nothing in targets[t : t + k + 1] is IGNORED: then all of it is one document.
        """
        if depth >= self.targets.shape[1]:
            return 0
        is_target = self.targets != IGNORED
        return int(is_target.unfold(1, depth + 1, 1).all(-1).sum())


def collate(samples: list[Sample]) -> Batch:
    """The samples as one batch."""
    return to_batch(stack_rows(samples))


class Taken(NamedTuple):
    """This rank's micro-batches of a global batch, and the run's position after that batch."""

    batches: list[Batch]
    position: Position


class Batches:
    """Reads this rank's share of global batches, the following one ahead in a thread."""

    def __init__(self, order: SampleOrder, *, rank: int, world: int, micro_batch_size: int) -> None:
        assert 0 <= rank < world
        self._order = order
        self._rank = rank
        self._world = world
        self._micro_batch_size = micro_batch_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[Position, int, Future[Taken]] | None = None

    def take(self, position: Position, count: int) -> Taken:
        """This rank's micro-batches of the `count` samples that follow a position.

        The batch of the same size that follows is then read in the background; if another one
        is asked for instead, it is read when it is.

        Raises:
            ValueError: `count` is not a multiple of world * micro_batch_size, or the data end.
            OSError: The corpus can't be read any more.
        """
        across = self._world * self._micro_batch_size
        if count < 1 or count % across:
            raise ValueError(
                f"a global batch of {count} samples is not divisible by {self._world} ranks times "
                f"micro_batch_size={self._micro_batch_size}; choose a multiple of {across}"
            )
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (position, count):
            taken = ahead[2].result()
        else:
            taken = self._thread.submit(self.read, position, count).result()
        following = self._thread.submit(self.read, taken.position, count)
        self._ahead = taken.position, count, following
        return taken

    def close(self) -> None:
        """Ends the thread, after what it is reading."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, position: Position, count: int) -> Taken:
        """What `take` returns, read now and in this thread."""
        drawn = self._order.draw(position, count)
        size = self._micro_batch_size
        starts = range(self._rank * size, count, self._world * size)
        own = [drawn.rows[first + place] for first in starts for place in range(size)]
        return Taken([to_batch(rows) for rows in self._order.read(own, size)], drawn.position)


def to_batch(rows: Rows) -> Batch:
    """The rows as tensors, in page-locked memory where a GPU will fetch them."""
    tensors = [torch.from_numpy(array) for array in rows[:4]]
    if torch.cuda.is_available():
        tensors = [tensor.pin_memory() for tensor in tensors]
    tokens, targets, positions, is_real = tensors
    return Batch(tokens, targets, positions, is_real, rows.document_lengths)


def validation_batches(
    samples: Samples, *, rank: int, world: int, micro_batch_size: int, limit: int | None = None
) -> Iterator[Batch]:
    """This rank's share of the first `limit` samples (None: of one epoch), each once.

    All ranks get equally many batches; what is missing from the last ones is padding.
    """
    num_samples = samples.num_samples if limit is None else min(limit, samples.num_samples)
    for start in range(0, num_samples, world * micro_batch_size):
        first = start + rank * micro_batch_size
        yield collate(
            [
                samples[index] if index < num_samples else samples.padding()
                for index in range(first, first + micro_batch_size)
            ]
        )
