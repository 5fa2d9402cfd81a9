"""Where a run stands in its data, as plain values that a checkpoint keeps.

No rank, batch size or sequence length is part of a position, so each of them, and the blend, may
change where it stands: what was read stays read, what was not is still to come.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.fim import NO_FIM, FimMode, FimSetting


class Cut(NamedTuple):
    """Rows that were read of a window, of those that its content then was packed into."""

    packing: str
    seq_len: int
    rows: int


@dataclass(slots=True, kw_only=True, frozen=True)
class SourcePosition:
    """How far one source is read.

    Its documents have an endless order, epoch after epoch; they are packed a window at a time. A
    window that was begun is read to its end whatever changes meanwhile: it keeps its documents
    and its FIM, and what `cuts` leave of it is packed anew.
    """

    document: int = 0  # place in the order of the window's first document
    end: int = 0  # and of the first one after it; no window is open where both are equal
    fim: FimSetting = NO_FIM  # of the open window
    cuts: tuple[Cut, ...] = ()  # what was read of the open window, in order
    tokens: int = 0  # all that were read from the source
    credit: int = 0  # tokens that the blend owes it, in shares of 2^-32


@dataclass(slots=True, kw_only=True, frozen=True)
class Position:
    """How far a run is: all that decides the next sample, given seed and config."""

    samples: int = 0  # sequences read so far
    sources: dict[str, SourcePosition] = field(default_factory=dict)
    blends: tuple[dict[str, Any], ...] = ()  # what was read how, each from a `samples` on

    @property
    def tokens(self) -> int:
        """Tokens read so far, padding left out."""
        return sum(source.tokens for source in self.sources.values())


def read_position(values: dict[str, Any]) -> Position:
    """The position from its JSON form."""
    sources = {name: _read_source(source) for name, source in values["sources"].items()}
    return Position(samples=values["samples"], sources=sources, blends=tuple(values["blends"]))


def _read_source(values: dict[str, Any]) -> SourcePosition:
    rate, mode = values["fim"]
    cuts = tuple(Cut(*cut) for cut in values["cuts"])
    return SourcePosition(**values | {"fim": FimSetting(rate, FimMode(mode)), "cuts": cuts})
