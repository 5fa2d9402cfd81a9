"""One source of a mixture: its documents in an endless order that no memory holds.

Epoch e reads the documents in the order of a keyed permutation of its own. A document's *place*
counts through all epochs; a *block* is a run of places that is looked up at once.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.documents import DocumentIndex
from data.fim import MARKERS, Fim, FimSetting, Part
from data.permutation import Permutation
from data.token_stream import TokenStream
from data.tokenizer import FimIds

BLOCK = 1024
CACHED_BLOCKS = 4


class Block(NamedTuple):
    """Up to BLOCK consecutive places of an epoch, as lists: they are read singly."""

    documents: list[int]
    starts: list[int]  # in the stream
    stored: list[int]  # tokens in the stream
    lengths: list[int]  # tokens as they are read
    prompts: list[int]
    is_rearranged: list[bool]


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
        return block.lengths[at]

    def find(self, place: int, fim: FimSetting) -> tuple[Block, int]:
        """The block that a place is in, and where."""
        epoch, place = divmod(place, self.num_documents)
        number, at = divmod(place, BLOCK)
        return self._block(epoch, number, fim), at

    def arrange(self, place: int, fim: FimSetting) -> list[Part]:
        """The parts in which the document at a place is read."""
        assert self.stream is not None
        block, at = self.find(place, fim)
        stored = block.stored[at]
        if not block.is_rearranged[at]:
            return [(0, stored)]
        start, tokenizer = block.starts[at], self.stream.tokenizer
        first = int(stored > 0 and self.stream.token(start) == tokenizer.bos_id)
        has_eos = stored > first and self.stream.token(start + stored - 1) == tokenizer.eos_id
        draw = self._fim(fim, place // self.num_documents)
        assert draw is not None
        return draw.arrange(block.documents[at], first, stored - has_eos, stored)

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
            documents=documents.tolist(),
            starts=spans.starts.tolist(),
            stored=spans.lengths.tolist(),
            lengths=(spans.lengths + MARKERS * chosen).tolist(),
            prompts=spans.prompts.tolist(),
            is_rearranged=chosen.tolist(),
        )
