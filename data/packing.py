"""How the documents of a window fill rows of seq_len tokens.

*Concatenated*, they follow each other and are cut where a row ends; only the window's last row
holds padding. By *best fit* (arXiv:2404.10830) they stay whole wherever a row can hold them: each
piece, longest first, goes to the row in which it leaves the least room, and what room remains is
padding. Either way the rows are then shuffled.

Every rank packs every window, so all of it works on whole arrays. P pieces, R rows.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.permutation import Permutation

Numbers = npt.NDArray[np.int64]


class Packing(StrEnum):
    """How documents fill rows of seq_len tokens."""

    concatenate = "concatenate"  # one after another, cut where a row ends
    best_fit = "best_fit"  # whole wherever possible, padded


class Piece(NamedTuple):
    """Consecutive tokens of one document, as it is read."""

    place: int  # of the document in its source's order
    offset: int
    length: int


class Pieces(NamedTuple):
    """Many of them, arrays of [P]."""

    places: Numbers
    offsets: Numbers
    lengths: Numbers

    def take(self, which: slice | npt.NDArray[np.integer[Any]]) -> "Pieces":
        """Some of them."""
        return Pieces(self.places[which], self.offsets[which], self.lengths[which])

    def list(self) -> list[Piece]:
        """One by one."""
        return list(map(Piece, *(array.tolist() for array in self)))


class PackedRows(NamedTuple):
    """Rows of at most seq_len tokens, in the order in which they are read."""

    pieces: Pieces  # of one row after another
    borders: list[int]  # the first piece of each row, and the end, [R + 1]
    sizes: list[int]  # tokens of each row, [R]

    def row(self, number: int) -> Pieces:
        """What one row is made of."""
        return self.pieces.take(slice(self.borders[number], self.borders[number + 1]))

    def left_after(self, number: int) -> Pieces:
        """The runs of tokens that are left when so many rows were read: in the order of their
        documents, pieces that follow each other as one."""
        pieces = self.pieces.take(slice(self.borders[number], None))
        places, offsets, lengths = pieces.take(np.lexsort((pieces.offsets, pieces.places)))
        goes_on = (places[1:] == places[:-1]) & (offsets[1:] == offsets[:-1] + lengths[:-1])
        firsts = np.flatnonzero(np.append(True, ~goes_on)[: len(places)])
        joined = np.add.reduceat(lengths, firsts) if len(firsts) else lengths
        return Pieces(places[firsts], offsets[firsts], joined)


def window_size(seq_len: int) -> int:
    """Tokens that are packed together: enough rows that their order is well mixed and little is
    padding, and not so many that planning them takes long or much memory."""
    return min(2048 * seq_len, max(2**25, 128 * seq_len))


def pack(runs: Pieces, seq_len: int, packing: Packing, *, key: bytes) -> PackedRows:
    """The runs of tokens in rows of at most `seq_len`, in an order chosen by `key`."""
    pieces, rows = (_fit if packing is Packing.best_fit else _concatenate)(runs, seq_len)
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    if num_rows > 1:
        rows = Permutation(num_rows, key=key).inverse(np.arange(num_rows))[rows]
    order = np.argsort(rows, kind="stable")  # in a row, pieces stay in their order
    pieces, rows = pieces.take(order), rows[order]
    borders = np.searchsorted(rows, np.arange(num_rows + 1))
    filled = np.append(0, np.cumsum(pieces.lengths))[borders]
    return PackedRows(pieces, borders.tolist(), np.diff(filled).tolist())


class _Placed(NamedTuple):
    pieces: Pieces
    rows: Numbers  # each piece's


def _cut(runs: Pieces, starts: Numbers, seq_len: int) -> _Placed:
    """The runs cut at multiples of seq_len, if they lay at `starts`; with each piece's multiple."""
    first, last = starts // seq_len, (starts + runs.lengths - 1) // seq_len
    counts = np.where(runs.lengths > 0, last - first + 1, 0)
    run = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = first[run] + number
    begins = np.maximum(rows * seq_len, starts[run])
    ends = np.minimum((rows + 1) * seq_len, (starts + runs.lengths)[run])
    offsets = runs.offsets[run] + begins - starts[run]
    return _Placed(Pieces(runs.places[run], offsets, ends - begins), rows)


def _concatenate(runs: Pieces, seq_len: int) -> _Placed:
    return _cut(runs, np.cumsum(runs.lengths) - runs.lengths, seq_len)


def _fit(runs: Pieces, seq_len: int) -> _Placed:
    pieces, _ = _cut(runs, np.zeros_like(runs.lengths), seq_len)
    order = np.argsort(-pieces.lengths, kind="stable")  # equals stay in their order
    lengths, counts = np.unique(-pieces.lengths, return_counts=True)
    rows = np.empty_like(order)
    rows[order] = _best_rows((-lengths).tolist(), counts.tolist(), seq_len)
    return _Placed(pieces, rows)


def _best_rows(lengths: Sequence[int], counts: Sequence[int], seq_len: int) -> list[int]:
    """The row of each piece, of so many pieces of each length, longest first."""
    rows: list[int] = []
    num_rows = 0
    by_room: dict[int, list[int]] = {}  # rows that have this much room left
    rooms: list[int] = []  # the keys of by_room, ascending
    for length, count in zip(lengths, counts, strict=True):
        while count:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                room, row = seq_len, num_rows
                num_rows += 1
            else:
                room = rooms[at]
                row = by_room[room].pop()
                if not by_room[room]:
                    del by_room[room], rooms[at]
            # No other row has room between this one's and the piece's: it takes the next ones too.
            taken = min(count, room // length)
            rows += [row] * taken
            count -= taken
            room -= taken * length
            if room:
                if room not in by_room:
                    by_room[room] = []
                    insort(rooms, room)
                by_room[room].append(row)
    return rows
