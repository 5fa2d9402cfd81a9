"""How the documents of a window fill rows of seq_len tokens.

*Concatenated*, they follow each other and are cut where a row ends; only the window's last row
holds padding. By *best fit* (arXiv:2404.10830) they stay whole wherever a row can hold them: each
piece, longest first, goes to the row in which it leaves the least room, and what room remains is
padding. Either way the rows are then shuffled.

Every rank packs every window and reads few of its rows, so it works on whole arrays, and what is
concatenated is cut only in the rows that are asked for. P pieces, R rows.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

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


class FoundRows(NamedTuple):
    """What some rows are made of."""

    pieces: Pieces  # of one row after another
    counts: Numbers  # of each row's pieces


class PackedRows(Protocol):
    """Rows of at most seq_len tokens, in the order in which they are read."""

    num_rows: int

    def count_tokens(self, first: int, last: int) -> int:
        """Tokens of the rows in [first, last)."""
        ...

    def find(self, numbers: Numbers) -> FoundRows:
        """What rows are made of; a row's pieces are in the order of their documents."""
        ...


def left_after(rows: PackedRows, number: int) -> Pieces:
    """The runs of tokens that are left when so many rows were read: in the order of their
    documents, pieces that follow each other as one."""
    pieces = rows.find(np.arange(number, rows.num_rows)).pieces
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
    runs = runs.take(np.flatnonzero(runs.lengths))
    return (_Fitted if packing is Packing.best_fit else _Concatenated)(runs, seq_len, key)


def _draw_order(num_rows: int, key: bytes) -> Numbers:
    """Which of the rows, as they were filled, is read first, and so on, [R]."""
    numbers = np.arange(num_rows)
    return Permutation(num_rows, key=key)(numbers) if num_rows > 1 else numbers


def _count_up(starts: Numbers, counts: Numbers) -> Numbers:
    """So many numbers from each start on, [sum(counts)]."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


class _Concatenated:
    """Runs one after another, cut only in rows that somebody asks for: row k holds the tokens
    from k * seq_len on, so it is found by bisection."""

    def __init__(self, runs: Pieces, seq_len: int, key: bytes) -> None:
        self._runs, self._seq_len = runs, seq_len
        self._ends = np.cumsum(runs.lengths)
        self._size = int(self._ends[-1]) if len(self._ends) else 0
        self.num_rows = -(-self._size // seq_len)
        self._order = _draw_order(self.num_rows, key)
        self._last = np.flatnonzero(self._order == self.num_rows - 1)  # the one that may be short

    def count_tokens(self, first: int, last: int) -> int:
        missing = self.num_rows * self._seq_len - self._size
        is_short = self.num_rows > 0 and first <= self._last[0] < last
        return (last - first) * self._seq_len - missing * bool(is_short)

    def find(self, numbers: Numbers) -> FoundRows:
        starts = self._order[numbers] * self._seq_len
        stops = np.minimum(starts + self._seq_len, self._size)
        first = np.searchsorted(self._ends, starts, side="right")
        counts = np.searchsorted(self._ends, stops, side="left") - first + 1
        which = _count_up(first, counts)
        places, offsets, lengths = self._runs.take(which)
        run_ends = self._ends[which]
        run_starts = run_ends - lengths
        begins = np.maximum(run_starts, np.repeat(starts, counts))
        ends = np.minimum(run_ends, np.repeat(stops, counts))
        return FoundRows(Pieces(places, offsets + begins - run_starts, ends - begins), counts)


class _Fitted:
    """Runs cut where they fill a row, and their pieces fitted into rows."""

    def __init__(self, runs: Pieces, seq_len: int, key: bytes) -> None:
        pieces = _cut(runs, seq_len)
        by_length = np.argsort(-pieces.lengths, kind="stable")  # equals stay in their order
        lengths, counts = np.unique(-pieces.lengths, return_counts=True)
        rows = np.empty_like(by_length)
        rows[by_length] = _best_rows((-lengths).tolist(), counts.tolist(), seq_len)
        self.num_rows = int(rows.max()) + 1 if len(rows) else 0
        numbers = np.empty(self.num_rows, np.int64)
        numbers[_draw_order(self.num_rows, key)] = np.arange(self.num_rows)
        in_rows = np.argsort(numbers[rows], kind="stable")  # in a row they stay in their order
        self._pieces = pieces.take(in_rows)
        self._counts = np.bincount(numbers[rows], minlength=self.num_rows)
        self._borders = np.append(0, np.cumsum(self._counts))
        self._filled = np.append(0, np.cumsum(self._pieces.lengths))[self._borders].tolist()

    def count_tokens(self, first: int, last: int) -> int:
        return int(self._filled[last] - self._filled[first])

    def find(self, numbers: Numbers) -> FoundRows:
        counts = self._counts[numbers]
        return FoundRows(self._pieces.take(_count_up(self._borders[numbers], counts)), counts)


def _cut(runs: Pieces, seq_len: int) -> Pieces:
    """The runs in pieces of at most `seq_len`."""
    counts = -(-runs.lengths // seq_len)
    run = np.repeat(np.arange(len(counts)), counts)
    begins = _count_up(np.zeros_like(counts), counts) * seq_len
    lengths = np.minimum(runs.lengths[run] - begins, seq_len)
    return Pieces(runs.places[run], runs.offsets[run] + begins, lengths)


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
