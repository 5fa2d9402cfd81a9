"""Copies many stretches of memory-mapped files at once, and lives to tell if one has vanished.

Touching a mapping whose file was cut short, or whose file system is gone, ends the process
(SIGBUS). When the kernel does the touching it answers with an error instead. So the stretches
are written, all in one call, to a file in memory that is mapped too; this costs no more than
copying them one by one.
"""

import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer[Any]]

MOST_AT_ONCE = 1024  # buffers that writev takes (IOV_MAX)


class Gather:
    """The stretches that it is given, one after another in one array."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("gathered"), "r+b", buffering=0)
        self._resize(2**16)

    def __call__(self, stretches: list[Tokens]) -> Tokens:
        """Their tokens, of the type that all of them have; overwritten by the next call.

        Raises:
            OSError: One of them can't be read any more.
        """
        wanted = sum(stretch.nbytes for stretch in stretches)
        if wanted > len(self._memory):
            self._resize(1 << (wanted - 1).bit_length())
        written = 0
        for first in range(0, len(stretches), MOST_AT_ONCE):
            some = stretches[first : first + MOST_AT_ONCE]
            written += os.pwritev(self._file.fileno(), some, written)  # type: ignore[arg-type]
        if written != wanted:
            raise OSError("a file is shorter than it was")
        return np.frombuffer(self._memory, stretches[0].dtype, wanted // stretches[0].itemsize)

    def _resize(self, num_bytes: int) -> None:
        self._file.truncate(num_bytes)
        self._memory = mmap.mmap(self._file.fileno(), num_bytes)
