"""How the documents of a window fill rows of seq_len tokens.

*Concatenated*, they follow each other and are cut where a row ends; only the window's last row
holds padding. By *best fit* (arXiv:2404.10830) they stay whole wherever a row can hold them: each
piece, longest first, goes to the row in which it leaves the least room, and what room remains is
padding. Either way the rows are then shuffled.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from data.permutation import Permutation


class Packing(StrEnum):
    """How documents fill rows of seq_len tokens."""

    concatenate = "concatenate"  # one after another, cut where a row ends
    best_fit = "best_fit"  # whole wherever possible, padded


class Piece(NamedTuple):
    """Consecutive tokens of one document, as it is read."""

    place: int  # of the document in its source's order
    offset: int
    length: int


def window_size(seq_len: int) -> int:
    """Tokens that are packed together: enough rows that their order is well mixed and little is
    padding, and not so many that planning them takes long or much memory."""
    return min(2048 * seq_len, max(2**25, 128 * seq_len))


def pack(runs: list[Piece], seq_len: int, packing: Packing, *, key: bytes) -> list[list[Piece]]:
    """The runs of tokens in rows of at most `seq_len`, in an order chosen by `key`."""
    by_fit = packing is Packing.best_fit
    rows = _fit(runs, seq_len) if by_fit else _concatenate(runs, seq_len)
    if len(rows) < 2:
        return rows
    order = Permutation(len(rows), key=key)(np.arange(len(rows)))
    return [rows[number] for number in order.tolist()]


def join_runs(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces in the order of their documents, those that follow each other as one."""
    runs: list[Piece] = []
    for piece in sorted(pieces):
        last = runs[-1] if runs else None
        if last and (last.place, last.offset + last.length) == (piece.place, piece.offset):
            runs[-1] = last._replace(length=last.length + piece.length)
        else:
            runs.append(piece)
    return runs


def _concatenate(runs: list[Piece], seq_len: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    row: list[Piece] = []
    room = seq_len
    for place, offset, length in runs:
        while length >= room:
            row.append(Piece(place, offset, room))
            rows.append(row)
            offset, length = offset + room, length - room
            row, room = [], seq_len
        if length:
            row.append(Piece(place, offset, length))
            room -= length
    return [*rows, row] if row else rows


def _fit(runs: list[Piece], seq_len: int) -> list[list[Piece]]:
    pieces = [
        Piece(run.place, run.offset + start, min(seq_len, run.length - start))
        for run in runs
        for start in range(0, run.length, seq_len)
    ]
    pieces.sort(key=lambda piece: -piece.length)  # stable: equals stay in their order
    rows: list[list[Piece]] = []
    by_room: dict[int, list[int]] = {}  # rows that have this much room left
    rooms: list[int] = []  # the keys of by_room, ascending
    for piece in pieces:
        at = bisect_left(rooms, piece.length)
        if at == len(rooms):
            room, row = seq_len, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(piece)
        room -= piece.length
        if room:
            if room not in by_room:
                by_room[room] = []
                insort(rooms, room)
            by_room[room].append(row)
    return [sorted(row) for row in rows]
