"""The one order of all samples of a run, over any number of sources.

A sample is a row of pieces of documents of one source. Which source it is and which pieces follow
is decided from the position alone, by looking at lengths; so every rank knows the whole order and
reads only its own rows. A window is packed at once, and a row that another rank reads is only a
number in it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar, overload

import numpy as np

from data.blend import SHARES, Blend, to_shares
from data.fim import NO_FIM, FimSetting
from data.packing import PackedRows, Packing, Piece, Pieces, left_after, pack, window_size
from data.position import Cut, Position, SourcePosition
from data.source import Block, Source

T = TypeVar("T")


class Window(NamedTuple):
    """Documents that are packed together."""

    source: str
    start: int
    end: int
    fim: FimSetting


class Row(NamedTuple):
    """What one sample is made of: at most seq_len tokens, the rest is padding."""

    window: Window
    documents: Block  # all of the window's
    packed: PackedRows  # what is left of the window
    number: int  # of those rows

    @property
    def source(self) -> str:
        return self.window.source

    @property
    def fim(self) -> FimSetting:
        return self.window.fim

    @property
    def pieces(self) -> list[Piece]:
        return self.packed.find(np.array([self.number])).pieces.list()


class OpenWindow(NamedTuple):
    """A window that rows are taken of."""

    window: Window
    documents: Block  # all of the window's
    packed: PackedRows  # what is left of it


class DrawnRows(Sequence[Row]):
    """Rows that are put together when they are asked for: most of them other ranks read."""

    def __init__(self) -> None:
        self._windows: list[OpenWindow] = []
        self._numbers: list[int] = []

    def add(self, window: OpenWindow, numbers: range) -> None:
        """Append rows of a window."""
        self._windows += [window] * len(numbers)
        self._numbers += numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, which: int) -> Row: ...
    @overload
    def __getitem__(self, which: slice) -> list[Row]: ...
    def __getitem__(self, which: int | slice) -> Row | list[Row]:
        if isinstance(which, int):
            return Row(*self._windows[which], self._numbers[which])
        return [self[index] for index in range(len(self))[which]]


class Drawn(NamedTuple, Generic[T]):
    """Consecutive samples, not read yet, and the position after them."""

    rows: Sequence[T]
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
        self._most_windows = 2 * len(self.sources)
        self._documents: dict[Window, Block] = {}
        self._pack = lru_cache(maxsize=self._most_windows)(self._pack_window)

    def draw(self, position: Position, count: int) -> Drawn[Row]:
        """The next `count` samples after a position: a pure function of both, seed and config.

        Raises:
            ValueError: Every source has reached its last epoch.
        """
        cursors = {
            name: _Cursor(name, position.sources.get(name, SourcePosition()))
            for name in self.sources
        }
        tokens = position.tokens
        rows = DrawnRows()
        while len(rows) < count:
            shares = self._shares(cursors, tokens)
            until = self._blend.holds_until(tokens)
            owed = [(cursors[name], share) for name, share in shares.items()]
            has_closed = False
            while not has_closed and len(rows) < count and (until is None or tokens < until):
                cursor, _ = max(owed, key=lambda one: one[0].credit + one[1] * self._seq_len)
                limit = count - len(rows)
                if len(owed) > 1:
                    limit = 1
                elif until is not None:
                    limit = min(limit, max((until - tokens) // self._seq_len, 1))
                window, numbers = self._take_rows(cursor, limit)
                rows.add(window, numbers)
                size = window.packed.count_tokens(numbers.start, numbers.stop)
                for other, share in owed:
                    other.credit += share * size
                cursor.credit -= SHARES * size
                cursor.tokens += size
                tokens += size
                has_closed = not cursor.cuts
        moved = {name: cursor.close() for name, cursor in cursors.items()}
        sources = {**position.sources, **moved}
        return Drawn(rows, replace(position, samples=position.samples + count, sources=sources))

    def _shares(self, cursors: dict[str, "_Cursor"], tokens: int) -> dict[str, int]:
        """The weights of the sources that go on."""
        left = {
            name: weight
            for name, weight in self._blend.at(tokens).items()
            if weight > 0
            and (cursors[name].cuts or not self.sources[name].has_ended(cursors[name].document))
        }
        if not left:
            raise ValueError(
                f"the data end after {tokens} tokens: every source with a weight has reached its "
                "max_epochs; allow more epochs, add sources, or set fewer schedule.steps"
            )
        return to_shares(left)

    def _take_rows(self, cursor: "_Cursor", limit: int) -> "_Taken":
        """Up to `limit` next rows of the window that the source stands in, or of the one after
        it; none of a window that holds only empty documents."""
        if not cursor.cuts:
            cursor.fim = self._fim
            cursor.end = self._begin(cursor.name, cursor.document)
        wanted = (self._packing.value, self._seq_len)
        if not cursor.cuts or cursor.cuts[-1][:2] != wanted:
            cursor.cuts.append(Cut(*wanted, 0))
        *done, (*_, first) = cursor.cuts
        window = Window(cursor.name, cursor.document, cursor.end, cursor.fim)
        packed = self._pack(window, tuple(done), *wanted)
        last = min(first + limit, packed.num_rows)
        cursor.cuts[-1] = Cut(*wanted, last)
        if last == packed.num_rows:
            cursor.document, cursor.cuts = cursor.end, []
        return _Taken(OpenWindow(window, self._look_up(window), packed), range(first, last))

    def _begin(self, name: str, start: int) -> int:
        """Where a window ends that begins at a place of a source."""
        documents = self.sources[name].take_tokens(start, self._window_tokens, self._fim)
        end = start + len(documents.lengths)
        self._keep(Window(name, start, end, self._fim), documents)
        return end

    def _look_up(self, window: Window) -> Block:
        documents = self._documents.get(window)
        if documents is None:
            source = self.sources[window.source]
            documents = source.take(window.start, window.end, window.fim)
        self._keep(window, documents)
        return documents

    def _keep(self, window: Window, documents: Block) -> None:
        self._documents.pop(window, None)
        self._documents[window] = documents
        if len(self._documents) > self._most_windows:
            self._documents.pop(next(iter(self._documents)), None)  # not asked for the longest

    def _pack_window(
        self, window: Window, done: tuple[Cut, ...], packing: str, seq_len: int
    ) -> PackedRows:
        """The rows of what is left of a window."""
        if done:
            last = done[-1]
            before = self._pack(window, done[:-1], last.packing, last.seq_len)
            runs = left_after(before, last.rows)
        else:
            lengths = self._look_up(window).lengths
            runs = Pieces(np.arange(window.start, window.end), np.zeros_like(lengths), lengths)
        seed = self.sources[window.source].seed
        key = f"rows {seed} {window.source} {window.start} {len(done)}".encode()
        return pack(runs, seq_len, Packing(packing), key=key)


class _Taken(NamedTuple):
    window: OpenWindow
    numbers: range  # of rows


class _Cursor:
    """A source's position while it moves."""

    def __init__(self, name: str, at: SourcePosition) -> None:
        self.name = name
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
