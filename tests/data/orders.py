"""Sources without files, and the order of a run as slow and obvious code has it."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data.blend import SHARES, Blend
from data.documents import Numbers, Spans
from data.fim import Fim, FimSetting
from data.mixture import Mixture
from data.packing import Packing
from data.permutation import Permutation
from data.source import Source
from data.tokenizer import FimIds

FIM_IDS = FimIds(97, 98, 99)
WINDOW = 60  # tokens, so that small corpora have many windows


class ListedIndex:
    """Documents of the given lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.num_documents = len(lengths)
        self._lengths = np.array(lengths, np.int64)

    def find(self, documents: Numbers) -> Spans:
        ends = np.cumsum(self._lengths)
        lengths = self._lengths[documents]
        return Spans(ends[documents] - lengths, lengths, np.zeros_like(lengths))


class Setting(NamedTuple):
    """All that may change where a run stands."""

    weights: dict[str, float]
    seq_len: int
    packing: Packing
    fim: FimSetting
    max_epochs: float | None = None

    def mixture(self, corpora: dict[str, list[int]], seed: int) -> Mixture:
        """The mixture under test."""
        sources = [
            Source(
                name,
                ListedIndex(corpora[name]),
                seed=seed,
                fim_ids=FIM_IDS,
                max_epochs=self.max_epochs,
            )
            for name in self.weights
        ]
        return Mixture(
            sources,
            Blend(self.weights),
            seq_len=self.seq_len,
            packing=self.packing,
            fim=self.fim,
            size_window=lambda _: WINDOW,
        )


Token = tuple[int, int]
"""Which token of which document: its place in the order, and its offset."""


@dataclass
class _Shelf:
    """What the reference knows of a source."""

    next_place: int = 0
    left: list[Token] = field(default_factory=list)  # of the open window
    rows: list[list[Token]] | None = None  # of what is left, as they are packed now
    packed_as: Any = None
    times_packed: int = 0
    start: int = 0


class SlowOrder:
    """The order of a run, one token at a time and with everything kept in memory."""

    def __init__(self, corpora: dict[str, list[int]], seed: int) -> None:
        self._corpora = corpora
        self._seed = seed
        self._shelves: dict[str, _Shelf] = defaultdict(_Shelf)
        self._credit: dict[str, int] = defaultdict(int)

    def change_blend(self) -> None:
        """Another blend begins: nothing is owed any more."""
        self._credit.clear()

    def next_row(self, setting: Setting) -> tuple[str, list[Token]]:
        """The next sample's source and tokens."""
        while True:
            open_names = [n for n in sorted(setting.weights) if not self._has_ended(n, setting)]
            total = sum(setting.weights[name] for name in open_names)
            shares = {n: int(setting.weights[n] / total * SHARES) for n in open_names}
            heaviest = max(open_names, key=lambda name: shares[name])
            shares[heaviest] += SHARES - sum(shares.values())
            name = max(open_names, key=lambda n: self._credit[n] + shares[n] * setting.seq_len)
            row = self._next_row_of(name, setting)
            if row:
                for other in open_names:
                    self._credit[other] += shares[other] * len(row)
                self._credit[name] -= SHARES * len(row)
                return name, row

    def _has_ended(self, name: str, setting: Setting) -> bool:
        shelf = self._shelves[name]
        return not shelf.left and self._is_last(name, shelf, setting)

    def _is_last(self, name: str, shelf: _Shelf, setting: Setting) -> bool:
        if setting.max_epochs is None:
            return False
        return shelf.next_place >= int(setting.max_epochs * len(self._corpora[name]))

    def _next_row_of(self, name: str, setting: Setting) -> list[Token]:
        shelf = self._shelves[name]
        if not shelf.left:
            self._open_window(name, shelf, setting)
        packed_as = setting.packing, setting.seq_len
        if shelf.rows is None or shelf.packed_as != packed_as:
            shelf.rows = self._pack(name, shelf, setting)
            shelf.packed_as = packed_as
            shelf.times_packed += 1
        row = shelf.rows.pop(0) if shelf.rows else []
        shelf.left = [token for token in shelf.left if token not in row]
        return row

    def _open_window(self, name: str, shelf: _Shelf, setting: Setting) -> None:
        lengths = self._corpora[name]
        shelf.start, shelf.rows, shelf.times_packed = shelf.next_place, None, 0
        epoch = shelf.start // len(lengths)
        while len(shelf.left) < WINDOW and shelf.next_place // len(lengths) == epoch:
            if self._is_last(name, shelf, setting):
                break
            key = f"order {self._seed} {name} {epoch}".encode()
            document = Permutation(len(lengths), key=key)(shelf.next_place % len(lengths))
            key = f"fim {self._seed} {name} {epoch}".encode()
            length = lengths[document]
            if setting.fim.rate and Fim(setting.fim, FIM_IDS, key=key).are_chosen(
                np.array([document])
            ):
                length += 3
            shelf.left += [(shelf.next_place, offset) for offset in range(length)]
            shelf.next_place += 1

    def _pack(self, name: str, shelf: _Shelf, setting: Setting) -> list[list[Token]]:
        if setting.packing is Packing.concatenate:
            size = setting.seq_len
            rows = [shelf.left[i : i + size] for i in range(0, len(shelf.left), size)]
        else:
            rows = self._fit(shelf.left, setting.seq_len)
        key = f"rows {self._seed} {name} {shelf.start} {shelf.times_packed}".encode()
        if not rows:
            return []
        order = Permutation(len(rows), key=key)
        return [rows[order(number)] for number in range(len(rows))]

    def _fit(self, left: list[Token], seq_len: int) -> list[list[Token]]:
        pieces: list[list[Token]] = []
        for token in left:
            place, offset = token
            follows = pieces and pieces[-1][-1] == (place, offset - 1)
            if follows and len(pieces[-1]) < seq_len:
                pieces[-1].append(token)
            else:
                pieces.append([token])
        pieces.sort(key=lambda piece: -len(piece))
        rows: list[list[list[Token]]] = []
        changed: list[int] = []  # when each row was last added to
        for time, piece in enumerate(pieces):
            rooms = [seq_len - sum(map(len, row)) for row in rows]
            fitting = [n for n, room in enumerate(rooms) if room >= len(piece)]
            if not fitting:
                rows.append([piece])
                changed.append(time)
                continue
            least = min(rooms[n] for n in fitting)
            best = max((n for n in fitting if rooms[n] == least), key=lambda n: changed[n])
            rows[best].append(piece)
            changed[best] = time
        return [[token for piece in sorted(row) for token in piece] for row in rows]
