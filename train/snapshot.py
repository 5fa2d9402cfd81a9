"""A copy of a rank's state in host memory, from which a checkpoint is written beside training."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from train.manifest import Fragment

ALIGNMENT = 64  # bytes; a multiple of every dtype's size


class Snapshot:
    """One block of host memory, exactly as large as the state, filled anew at each save.

    On CUDA the block is pinned, so that the copies run at the bus's speed and need no buffer of
    the driver's. It is registered rather than taken from torch's pinned allocator, which rounds
    sizes up to a power of two.
    """

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        self.num_bytes = sum(_room(fragment.data) for fragment in fragments)
        self._memory = torch.empty(self.num_bytes, dtype=torch.uint8)
        if torch.cuda.is_available() and self.num_bytes:
            runtime: Any = torch.cuda.cudart()
            code = int(runtime.cudaHostRegister(self._memory.data_ptr(), self.num_bytes, 0))
            if code:
                raise ValueError(
                    f"CUDA error {code}: {self.num_bytes:,} bytes of host memory can't be pinned "
                    "for checkpoints; set checkpoint.asynchronous=false, or allow more locked "
                    "memory (ulimit -l)"
                )

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with their data copied here; complete when this returns."""
        taken = list(self._copy(fragments))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return taken

    def _copy(self, fragments: Iterable[Fragment]) -> Iterator[Fragment]:
        place = 0
        for fragment in fragments:
            room = self._memory[place : place + fragment.data.nbytes]
            here = room.view(fragment.data.dtype)
            here.copy_(fragment.data, non_blocking=True)
            place += _room(fragment.data)
            yield fragment._replace(data=here)


def _room(data: Tensor) -> int:
    return -(-data.nbytes // ALIGNMENT) * ALIGNMENT
