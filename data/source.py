"""One source of a mixture: its documents in an endless order that no memory holds.

Epoch e reads the documents in the order of a keyed permutation of its own. A document's *place*
counts through all epochs; a *block* is a run of places that is looked up at once.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.documents import DocumentIndex, Spans
from data.fim import MARKERS, Fim, FimSetting, Part
from data.gather import Tokens
from data.permutation import Permutation
from data.token_stream import TokenStream
from data.tokenizer import FimIds

BLOCK = 8192
CACHED_BLOCKS = 4

Numbers = npt.NDArray[np.int64]


class Block(NamedTuple):
    """The documents at consecutive places of an epoch, arrays of [N]."""

    documents: Numbers
    starts: Numbers  # in the stream
    stored: Numbers  # tokens in the stream
    lengths: Numbers  # tokens as they are read
    prompts: Numbers
    is_rearranged: npt.NDArray[np.bool_]

    def take(self, which: slice) -> "Block":
        """Some of them."""
        return self._replace(**{name: array[which] for name, array in self._asdict().items()})


class Source:
    """The documents of one corpus' training split, in their order.

    `max_epochs` ends the order (None: it never ends); a part of an epoch is as many documents.
    """

    def __init__(
        self,
        name: str,
        index: DocumentIndex,
        stream: TokenStream | None = None,
        *,
        seed: int,
        max_epochs: float | None = None,
        fim_ids: FimIds | None = None,
    ) -> None:
        """`stream` holds the tokens; without it there are only lengths."""
        self.name = name
        self.seed = seed
        self.num_documents = index.num_documents
        self.num_places = None if max_epochs is None else int(max_epochs * self.num_documents)
        self.stream = stream
        self._index = index
        self._fim_ids = fim_ids
        self._block = lru_cache(maxsize=CACHED_BLOCKS)(self._look_up)
        self._permutation = lru_cache(maxsize=2)(self._open_permutation)
        self._fim = lru_cache(maxsize=4)(self._open_fim)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that its tokens are stored in."""
        assert self.stream is not None
        return self.stream.dtype

    def has_ended(self, place: int) -> bool:
        """Whether the order ends before this place."""
        return self.num_places is not None and place >= self.num_places

    def epoch_end(self, place: int) -> int:
        """The first place of the next epoch, or the order's end."""
        end = (place // self.num_documents + 1) * self.num_documents
        return end if self.num_places is None else min(end, self.num_places)

    def length(self, place: int, fim: FimSetting) -> int:
        """Tokens of the document at a place, as it is read."""
        block, at = self.find(place, fim)
        return int(block.lengths[at])

    def take_tokens(self, place: int, size: int, fim: FimSetting) -> Block:
        """The documents from a place on that hold `size` tokens together, or the rest of the
        epoch."""
        blocks: list[Block] = []
        epoch_end = self.epoch_end(place)
        while place < epoch_end and size > 0:
            block, at = self.find(place, fim)
            sums = np.cumsum(block.lengths[at : at + epoch_end - place])
            count = min(int(np.searchsorted(sums, size)) + 1, len(sums))
            blocks.append(block.take(slice(at, at + count)))
            place, size = place + count, size - int(sums[count - 1])
        return _join(blocks)

    def take(self, start: int, stop: int, fim: FimSetting) -> Block:
        """The documents at the places in [start, stop), all of one epoch."""
        blocks: list[Block] = []
        while start < stop:
            block, at = self.find(start, fim)
            blocks.append(block.take(slice(at, at + stop - start)))
            start += len(blocks[-1].documents)
        return _join(blocks)

    def spans(self, documents: Numbers) -> Spans:
        """Where documents lie, by their numbers in the corpus."""
        return self._index.find(documents)

    def find(self, place: int, fim: FimSetting) -> tuple[Block, int]:
        """The block that a place is in, and where."""
        epoch, place = divmod(place, self.num_documents)
        number, at = divmod(place, BLOCK)
        return self._block(epoch, number, fim), at

    def arrange(self, place: int, fim: FimSetting) -> list[Part]:
        """The parts in which the document at a place is read."""
        assert self.stream is not None
        block, at = self.find(place, fim)
        stored, start = int(block.stored[at]), int(block.starts[at])
        if not block.is_rearranged[at]:
            return [(0, stored)]
        tokenizer = self.stream.tokenizer
        first = int(stored > 0 and self.stream.token(start) == tokenizer.bos_id)
        has_eos = stored > first and self.stream.token(start + stored - 1) == tokenizer.eos_id
        draw = self._fim(fim, place // self.num_documents)
        assert draw is not None
        return draw.arrange(int(block.documents[at]), first, stored - has_eos, stored)

    def parts(self, place: int, offset: int, count: int, fim: FimSetting) -> list[Part]:
        """`count` tokens of the document at a place, as it is read, from `offset` on: markers, and
        ranges of the stream."""
        block, at = self.find(place, fim)
        start = int(block.starts[at])
        parts: list[Part] = []
        for part in self.arrange(place, fim):
            first, last = (0, 1) if isinstance(part, int) else part
            taken = min(last - first - offset, count)
            if taken > 0:
                begin = start + first + offset
                parts.append(part if isinstance(part, int) else (begin, begin + taken))
                count -= taken
            offset = max(offset - (last - first), 0)
        return parts

    def view(self, place: int, offset: int, count: int, fim: FimSetting) -> list[Tokens]:
        """These tokens, to be gathered by the stream."""
        assert self.stream is not None
        views: list[Tokens] = []
        for part in self.parts(place, offset, count, fim):
            if isinstance(part, int):
                views.append(np.array([part], self.dtype))
            else:
                views.append(self.stream.view(part[0], part[1] - part[0]))
        return views

    def _open_permutation(self, epoch: int) -> Permutation:
        return Permutation(
            self.num_documents, key=f"order {self.seed} {self.name} {epoch}".encode()
        )

    def _open_fim(self, fim: FimSetting, epoch: int) -> Fim | None:
        if fim.rate == 0:
            return None
        assert self._fim_ids is not None
        return Fim(fim, self._fim_ids, key=f"fim {self.seed} {self.name} {epoch}".encode())

    def _look_up(self, epoch: int, number: int, fim: FimSetting) -> Block:
        first, last = number * BLOCK, min((number + 1) * BLOCK, self.num_documents)
        documents = self._permutation(epoch)(np.arange(first, last))
        spans = self._index.find(documents)
        draw = self._fim(fim, epoch)
        if draw is None:
            chosen = np.zeros(len(documents), np.bool_)
        else:
            chosen = draw.are_chosen(documents) & (spans.prompts == 0)
        return Block(
            documents=documents,
            starts=spans.starts,
            stored=spans.lengths,
            lengths=spans.lengths + MARKERS * chosen,
            prompts=spans.prompts,
            is_rearranged=chosen,
        )


def _join(blocks: list[Block]) -> Block:
    return Block(*map(np.concatenate, zip(*blocks, strict=True)))
