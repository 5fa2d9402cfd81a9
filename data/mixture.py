"""The one order of all samples of a run, over any number of sources.

A sample is a row of pieces of documents of one source. Which source it is and which pieces follow
is decided from the position alone, by looking at lengths; so every rank knows the whole order and
reads only its own rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

from data.blend import SHARES, Blend, to_shares
from data.fim import NO_FIM, FimSetting
from data.packing import Packing, Piece, join_runs, pack, window_size
from data.position import Cut, Position, SourcePosition
from data.source import Source

T = TypeVar("T")


class Row(NamedTuple):
    """What one sample is made of: at most seq_len tokens, the rest is padding."""

    source: str
    fim: FimSetting
    pieces: list[Piece]


class Drawn(NamedTuple, Generic[T]):
    """Consecutive samples, not read yet, and the position after them."""

    rows: list[T]
    position: Position


class Mixture:
    """Draws samples of `seq_len` tokens from sources, in shares that follow the blend."""

    def __init__(
        self,
        sources: Iterable[Source],
        blend: Blend,
        *,
        seq_len: int,
        packing: Packing = Packing.concatenate,
        fim: FimSetting = NO_FIM,
        size_window: Callable[[int], int] = window_size,
    ) -> None:
        self.sources = {source.name: source for source in sources}
        self._blend = blend
        self._seq_len = seq_len
        self._packing = packing
        self._fim = fim
        self._window_tokens = size_window(seq_len)
        self._pack = lru_cache(maxsize=2 * len(self.sources))(self._pack_window)

    def draw(self, position: Position, count: int) -> Drawn[Row]:
        """The next `count` samples after a position: a pure function of both, seed and config.

        Raises:
            ValueError: Every source has reached its last epoch.
        """
        cursors = {
            name: _Cursor(position.sources.get(name, SourcePosition())) for name in self.sources
        }
        tokens = position.tokens
        rows: list[Row] = []
        shares: dict[str, int] = {}
        holds_until: int | None = -1
        while len(rows) < count:
            has_changed = holds_until is not None and tokens >= holds_until
            if has_changed or any(self._has_ended(name, cursors[name]) for name in shares):
                shares = self._shares(cursors, tokens)
                holds_until = self._blend.holds_until(tokens)
            name = max(shares, key=lambda name: cursors[name].credit + shares[name] * self._seq_len)
            row = self._take_row(name, cursors[name])
            size = sum(piece.length for piece in row.pieces)
            if not size:
                continue  # a window of empty documents
            for owed, share in shares.items():
                cursors[owed].credit += share * size
            cursors[name].credit -= SHARES * size
            cursors[name].tokens += size
            tokens += size
            rows.append(row)
        moved = {name: cursor.close() for name, cursor in cursors.items()}
        sources = {**position.sources, **moved}
        return Drawn(rows, replace(position, samples=position.samples + count, sources=sources))

    def _has_ended(self, name: str, cursor: "_Cursor") -> bool:
        return not cursor.cuts and self.sources[name].has_ended(cursor.document)

    def _shares(self, cursors: dict[str, "_Cursor"], tokens: int) -> dict[str, int]:
        left = {
            name: weight
            for name, weight in self._blend.at(tokens).items()
            if weight > 0 and not self._has_ended(name, cursors[name])
        }
        if not left:
            raise ValueError(
                f"the data end after {tokens} tokens: every source with a weight has reached its "
                "max_epochs; allow more epochs, add sources, or set fewer schedule.steps"
            )
        return to_shares(left)

    def _take_row(self, name: str, cursor: "_Cursor") -> Row:
        """The next row of the window that the source stands in, or of the one after it."""
        if not cursor.cuts:
            cursor.end, cursor.fim = self._find_window(name, cursor.document), self._fim
        wanted = (self._packing.value, self._seq_len)
        if not cursor.cuts or cursor.cuts[-1][:2] != wanted:
            cursor.cuts.append(Cut(*wanted, 0))
        *done, (*_, number) = cursor.cuts
        window = Window(name, cursor.document, cursor.end, cursor.fim)
        rows = self._pack(window, tuple(done), *wanted)
        cursor.cuts[-1] = Cut(*wanted, number + 1)
        row = Row(name, cursor.fim, rows[number] if rows else [])
        if number + 1 >= len(rows):
            cursor.document, cursor.cuts = cursor.end, []
        return row

    def _find_window(self, name: str, place: int) -> int:
        """The place after a window's last document: it is full, or the epoch ends."""
        source = self.sources[name]
        epoch_end = source.epoch_end(place)
        size = 0
        while place < epoch_end and size < self._window_tokens:
            size += source.length(place, self._fim)
            place += 1
        return place

    def _pack_window(
        self, window: "Window", done: tuple[Cut, ...], packing: str, seq_len: int
    ) -> list[list[Piece]]:
        """The rows of what is left of a window."""
        name, start, end, fim = window
        source = self.sources[name]
        if done:
            last = done[-1]
            rows = self._pack(window, done[:-1], last.packing, last.seq_len)
            runs = join_runs(piece for row in rows[last.rows :] for piece in row)
        else:
            runs = [Piece(place, 0, source.length(place, fim)) for place in range(start, end)]
        key = f"rows {source.seed} {name} {start} {len(done)}".encode()
        return pack(runs, seq_len, Packing(packing), key=key)


class Window(NamedTuple):
    """Documents that are packed together."""

    source: str
    start: int
    end: int
    fim: FimSetting


class _Cursor:
    """A source's position while it moves."""

    def __init__(self, at: SourcePosition) -> None:
        self.document, self.end, self.fim = at.document, at.end, at.fim
        self.cuts, self.tokens, self.credit = list(at.cuts), at.tokens, at.credit

    def close(self) -> SourcePosition:
        """The position where it stands."""
        is_open = bool(self.cuts)
        return SourcePosition(
            document=self.document,
            end=self.end if is_open else self.document,
            fim=self.fim if is_open else NO_FIM,
            cuts=tuple(self.cuts),
            tokens=self.tokens,
            credit=self.credit,
        )
