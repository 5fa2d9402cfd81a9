"""The documents of a split by their number: where each lies in the stream, and how long it is.

The index is one memory-mapped file, so that a billion documents cost no memory and no time to
open. Pages that a lookup has touched are given back when the index is large.
"""

import mmap
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from data.atomic_file import write_aside
from data.shards import Shard

Numbers = npt.NDArray[np.int64]

KEEP_MAPPED = 2**24  # bytes of an index that may stay in memory once they were touched


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
        self._maps = [_map(path) for path in (starts, prompts) if path is not None]
        self._starts = np.frombuffer(self._maps[0], "<i8")
        self._prompts = None if prompts is None else np.frombuffer(self._maps[1], "<i4")
        self.num_documents = len(self._starts) - 1

    def find(self, documents: Numbers) -> Spans:
        starts = self._starts[documents]
        lengths = self._starts[documents + 1] - starts
        if self._prompts is None:
            prompts = np.zeros_like(starts)
        else:
            prompts = self._prompts[documents].astype(np.int64)
        if self._starts.nbytes > KEEP_MAPPED:
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
        return Spans(starts, lengths, prompts)

    def find_overlapping(self, start: int, stop: int) -> Numbers:
        """The numbers of the documents that have tokens in [start, stop) of the stream."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        return np.arange(first, last)


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


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
