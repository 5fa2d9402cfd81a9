"""State on a disk: tensors whose bytes are a file's, for what host memory can't hold.

The file is mapped into memory, so that a tensor on the disk is used like any other: the kernel
reads what is touched, writes what was changed, and lets go of what memory is needed for. Updates
and checkpoints pass over a tensor from front to back, which the kernel reads ahead. DeepSpeed's own
swapper (0.19.8, runtime/swap_tensor) is not used: it is compiled at the start, its buffers all have
the master's dtype, so that it can't hold moments in BF16 or 8 bits, and what it has swapped out is
nobody's to read or to fill. To DeepSpeed the state is offloaded to the CPU.
"""

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.layout.parallel import Offload, ParallelConfig

GIB = 2**30


class Disk:
    """A folder in which each tensor has an unnamed file, which ends with its process."""

    def __init__(self, folder: Path, *, needed: float, num_ranks: int) -> None:
        """`needed` bytes for each of the `num_ranks` ranks on this node.

        Raises:
            ValueError: The folder can't be written to, or has too little room.
        """
        self._folder = folder
        setting = f"parallel.nvme_path={folder}"
        try:
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free
        except OSError as error:
            raise ValueError(
                f"{setting} can't be written to ({error.strerror}); give a folder that exists on "
                "every node and that the run may write to"
            ) from error
        if free < needed * num_ranks:
            raise ValueError(
                f"{setting} has {free / GIB:,.1f} GiB left, but the {num_ranks} ranks on this node "
                f"need {needed * num_ranks / GIB:,.1f} GiB; choose a larger disk, or more nodes"
            )

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor of zeros, for which the room is taken now: a full disk fails no step.

        Raises:
            ValueError: The disk is full.
        """
        num_bytes = numel * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(0, dtype=dtype)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                raise ValueError(
                    f"parallel.nvme_path={self._folder}: no room for {num_bytes / GIB:,.1f} GiB "
                    f"more ({error.strerror}); make room, or choose a larger disk"
                ) from error
            mapped = mmap.mmap(file.fileno(), num_bytes)
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        return torch.frombuffer(mapped, dtype=dtype)

    @torch.no_grad()
    def take(self, tensor: Tensor) -> Tensor:
        """A copy on the disk."""
        return self.empty(tensor.numel(), tensor.dtype).view_as(tensor).copy_(tensor)

    def take_states(self, states: dict[str, Any]) -> None:
        """Replace what an optimizer keeps of one parameter by copies on the disk."""
        for name, kept in states.items():
            if kept.numel() > 1:  # not a counter
                states[name] = self.take(kept)


@contextmanager
def zero_3_on(disk: Disk, zero: Any, parallel: ParallelConfig) -> Iterator[None]:
    """Within it DeepSpeed's class of ZeRO 3, `zero`, puts on the disk what `parallel` says.

    Each tensor goes there as it is made, so that never all of them are in host memory.
    """
    puts: dict[str, Any] = {}
    if parallel.offload_parameters is Offload.nvme:
        puts["_create_param_groups_fp16_flat_cpu_memory"] = _put_weights
    if parallel.offload_optimizer is Offload.nvme:
        puts["_create_fp32_partitions"] = _put_masters
        puts["initialize_optimizer_states"] = _put_gradients
    makes = {name: getattr(zero, name) for name in puts}
    for name, put in puts.items():
        setattr(zero, name, put(disk, makes[name]))
    try:
        yield
    finally:
        for name, make in makes.items():
            setattr(zero, name, make)


Make = Callable[[Any], None]  # a method of DeepSpeed's ZeRO 3 that makes tensors


def _put_weights(disk: Disk, _: Make) -> Make:
    def make(zero: Any) -> None:
        """Instead of DeepSpeed's, which would pin memory for all of them."""
        for group in zero.trainable_param_groups:
            numel = sum(parameter.partition_numel() for parameter in group["params"])
            zero.param_groups_fp16_flat_cpu_memory.append(disk.empty(numel, zero.dtype))

    return make


def _put_masters(disk: Disk, make_masters: Make) -> Make:
    class OnDisk(list[Tensor]):
        def append(self, tensor: Tensor) -> None:
            super().append(disk.take(tensor))

    def make(zero: Any) -> None:
        zero.fp32_partitioned_groups_flat = OnDisk()
        make_masters(zero)

    return make


def _put_gradients(disk: Disk, start_states: Make) -> Make:
    def make(zero: Any) -> None:
        start_states(zero)
        for master in zero.fp32_partitioned_groups_flat:
            master.grad = disk.take(master.grad)

    return make
