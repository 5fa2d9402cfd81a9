"""The documents of a split by their number: where each lies in the stream, and how long it is.

The index is one memory-mapped file, so that a billion documents cost no memory and no time to
open. A large one is not looked up through the mapping: each touch may map 2 MiB of the page cache.
"""

import mmap
import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from data.atomic_file import write_aside
from data.shards import Shard

Numbers = npt.NDArray[np.int64]

KEEP_MAPPED = 2**24  # bytes of an index that may be mapped as lookups touch them


class Spans(NamedTuple):
    """Where documents lie, arrays of [N]."""

    starts: Numbers  # place of the first token in the split's stream
    lengths: Numbers  # tokens, bos and eos included
    prompts: Numbers  # how many of them, from the first, are a prompt that nothing is learnt from


class DocumentIndex(Protocol):
    """Looks documents up: a file's, or in tests a computed one of any size."""

    num_documents: int

    def find(self, documents: Numbers) -> Spans:
        """The documents' places."""
        ...


class MappedIndex:
    """The index that `prepare` wrote: starts i64[D + 1], and prompts' lengths i32[D] if any."""

    def __init__(self, starts: Path, prompts: Path | None) -> None:
        self._starts = _Numbers(starts, "<i8")
        self._prompts = None if prompts is None else _Numbers(prompts, "<i4")
        self.num_documents = len(self._starts.all) - 1

    def find(self, documents: Numbers) -> Spans:
        starts, ends = self._starts.take(documents, 2).T
        prompts = np.zeros_like(starts)
        if self._prompts is not None:
            prompts = self._prompts.take(documents, 1)[:, 0]
        return Spans(starts, ends - starts, prompts)

    def find_overlapping(self, start: int, stop: int) -> Numbers:
        """The numbers of the documents that have tokens in [start, stop) of the stream."""
        first = int(np.searchsorted(self._starts.all, start, side="right")) - 1
        last = int(np.searchsorted(self._starts.all, stop, side="left"))
        return np.arange(first, last)


class _Numbers:
    """A file of numbers; `all` of them are mapped."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (it closes with the object)
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self.all = np.frombuffer(mapped, dtype)

    def take(self, places: Numbers, count: int) -> Numbers:
        """The `count` numbers from each place on, [N, count].

        Raises:
            OSError: The file is shorter than it was.
        """
        if self.all.nbytes <= KEEP_MAPPED:
            return self.all[places[:, None] + np.arange(count)].astype(np.int64)
        taken = np.empty((len(places), count), self.all.dtype)
        content, size = taken.data.cast("B"), self.all.itemsize
        for k, place in enumerate(places.tolist()):
            own = content[k * count * size : (k + 1) * count * size]
            if os.preadv(self._file.fileno(), [own], place * size) != len(own):
                raise OSError(f"{self._file.name} is shorter than it was")
        return taken.astype(np.int64)


def write_index(shards: dict[Path, bool], starts: Path, prompts: Path | None) -> None:
    """Writes the two files of `MappedIndex` from the shards' own indices, one after another.

    `shards` says of each whether its documents of two sequences begin with a prompt.
    """
    end = 0
    with ExitStack() as stack:
        starts_file = stack.enter_context(write_aside(starts))
        prompts_file = None if prompts is None else stack.enter_context(write_aside(prompts))
        for prefix, has_prompts in shards.items():
            shard = Shard(prefix)
            places = shard.all_starts()
            has_tokens = np.diff(places) > 0  # other tools may store empty documents
            starts_file.write((places[:-1][has_tokens] + end).astype("<i8").tobytes())
            end += int(places[-1])
            if prompts_file is not None:
                lengths = shard.prompt_lengths()[has_tokens] * has_prompts
                prompts_file.write(lengths.astype("<i4").tobytes())
        starts_file.write(np.array([end], "<i8").tobytes())
