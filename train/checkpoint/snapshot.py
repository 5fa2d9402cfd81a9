"""A copy of a rank's state in host memory, from which a checkpoint is written beside training."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.manifest import Fragment

ALIGNMENT = 64  # bytes; a multiple of every dtype's size


class Snapshot:
    """One block of host memory, exactly as large as the state, filled anew at each save.

    On CUDA the block is pinned, so that the copies run at the bus's speed and need no buffer of
    the driver's. It is registered rather than taken from torch's pinned allocator, which rounds
    sizes up to a power of two.
    """

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        self.num_bytes = sum(_room(fragment.data) for fragment in fragments)
        # Written once: else the first save would wait for the kernel to find each page.
        self._memory = torch.empty(self.num_bytes, dtype=torch.uint8).zero_()
        if torch.cuda.is_available() and self.num_bytes:
            self._pin()

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with their data copied here; complete when this returns."""
        taken = list(self._copy(fragments))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return taken

    def _pin(self) -> None:
        """Raises ValueError: The memory can't be pinned."""
        runtime: Any = torch.cuda.cudart()
        address = self._memory.data_ptr()
        code = int(runtime.cudaHostRegister(address, self.num_bytes, 0))
        if code:
            raise ValueError(
                f"CUDA error {code}: {self.num_bytes:,} bytes of host memory can't be pinned "
                "for checkpoints; set checkpoint.asynchronous=false, or allow more locked "
                "memory (ulimit -l)"
            )
        # Else memory that is used anew for another snapshot would count as registered already.
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False

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
