"""Which tokens in the midst of documents no loss is taken on, as other tools store it.

A shard may have such a file beside its tokens: a byte per token, 0 where predicting it is not
learnt (datatrove's `.ds.loss`). Prompts, which end where the first token is learnt, need none of it
when they are read: their lengths stand in the index of documents (`data/documents.py`).
"""

import mmap
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.manifest import FileRecord

OPEN_MASKS = 256

Mask = npt.NDArray[np.uint8]


class LossMasks:
    """The masks of a split's shards, each memory-mapped when it is first read."""

    def __init__(self, folder: Path, records: Sequence[FileRecord | None]) -> None:
        self._folder = folder
        self._records = records
        self._open = lru_cache(maxsize=OPEN_MASKS)(self._map)

    def find(self, shard: int) -> Mask | None:
        """A shard's mask, [num_tokens]; None where all but prompts is learnt. To be gathered.

        Raises:
            OSError: Its file is gone, or has another size than when the corpus was prepared.
        """
        record = self._records[shard]
        return None if record is None else self._open(record)

    def close(self) -> None:
        """Let go of all; they are opened again when they are read."""
        self._open.cache_clear()

    def _map(self, record: FileRecord) -> Mask:
        path = self._folder / record.name
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.num_bytes:
                raise OSError(f"{path} has {size} bytes, was prepared with {record.num_bytes}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, np.uint8)


def find_learnt(mask: Mask) -> list[tuple[int, int]]:
    """The stretches [first, last) of a mask that are learnt."""
    edges = np.flatnonzero(np.diff(mask != 0, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
