"""The same split of several corpora as one stream of tokens, one corpus after another."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.documents import MappedIndex
from data.token_stream import TokenStream

Places = npt.NDArray[np.int64]


class Part(NamedTuple):
    """The split of one corpus; its documents only where they have prompts."""

    stream: TokenStream
    documents: MappedIndex | None = None


class Overlap(NamedTuple):
    """What a stretch of the whole covers of a part: its places [start, stop)."""

    part: Part
    start: int
    stop: int
    first: int  # place of the part in the whole


class JoinedSplit:
    """Tokens, borders and prompts by their place in the whole."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._firsts = [0, *accumulate(len(part.stream) for part in parts)]
        self.tokenizer = parts[0].stream.tokenizer

    def __len__(self) -> int:
        """The number of tokens."""
        return self._firsts[-1]

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The tokens in [start, stop), [stop - start].

        Raises:
            OSError: A shard can't be read; it is named.
        """
        read = [over.part.stream.read(over.start, over.stop) for over in self._find(start, stop)]
        return np.concatenate(read)

    def document_starts(self, start: int, stop: int) -> list[int]:
        """Places in [start, stop) where a document begins."""
        return [
            over.first + place
            for over in self._find(start, stop)
            for place in over.part.stream.document_starts(over.start, over.stop)
        ]

    def prompts(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The stretches [first, end) of the prompts that have tokens in [start, stop)."""
        found: list[tuple[int, int]] = []
        for part, first, last, offset in self._find(start, stop):
            if part.documents is None:
                continue
            spans = part.documents.find(part.documents.find_overlapping(first, last))
            begins, ends = spans.starts + offset, spans.starts + spans.prompts + offset
            found += zip(begins.tolist(), ends.tolist(), strict=True)
        return found

    def hidden(self, start: int, stop: int) -> Places:
        """Places in [start, stop) that masks say no loss is taken on."""
        found = [
            over.first + over.start + np.flatnonzero(over.part.stream.read_mask(*over[1:3]) == 0)
            for over in self._find(start, stop)
            if over.part.stream.masks is not None
        ]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def close(self) -> None:
        """Let go of all shards; they are opened again when they are read."""
        for part in self._parts:
            part.stream.close()

    def _find(self, start: int, stop: int) -> Iterator[Overlap]:
        """The parts that have tokens in [start, stop)."""
        assert 0 <= start < stop <= len(self)
        for part, first in zip(self._parts, self._firsts, strict=False):
            own_start, own_stop = max(start - first, 0), min(stop - first, len(part.stream))
            if own_start < own_stop:
                yield Overlap(part, own_start, own_stop, first)
