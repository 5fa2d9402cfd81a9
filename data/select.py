"""Which documents of a corpus are kept: settings of the quality filters and of the search for
duplicates. All of it is optional, and done by datatrove (`pip install 'thrifty[select]'`).
"""

from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

EXACT, NEAR = "exact_duplicate", "near_duplicate"
"""Why a duplicate is left out."""


class Filter(StrEnum):
    """A set of rules that a document must pass."""

    gopher_quality = "gopher_quality"  # arXiv:2112.11446, A.1.1: words, symbols, stop words
    gopher_repetition = "gopher_repetition"  # same place: repeated lines and phrases
    fineweb_quality = "fineweb_quality"  # arXiv:2406.17557, 3.6: ends of lines, short lines


@dataclass(slots=True, kw_only=True)
class FilterConfig:
    #: The rules: gopher_quality, gopher_repetition or fineweb_quality.
    name: Filter
    #: Thresholds other than the published ones, by datatrove's names: {min_doc_words: 20}. Stop
    #: words of gopher_quality are English unless given; for other text set {min_stop_words: 0}.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class SelectConfig:
    #: Quality filters, in order: name and options of each.
    filters: list[FilterConfig] = field(default_factory=list)
    #: Leave out a document whose text an earlier one has too.
    exact_duplicates: bool = False
    #: Leave out a document that an earlier one resembles, found by MinHash (arXiv:2107.06499, 4.2).
    near_duplicates: bool = False
    #: Words of one shingle: documents are compared by the runs of so many words that they share.
    ngram: int = 5
    #: Bands of hashes: documents that agree in all hashes of one band resemble each other.
    bands: int = 14
    #: Hashes of a band. Of pairs that share (1/bands)^(1/rows) of their shingles, 0.72 by default,
    #: about two thirds are found; of more alike ones, more.
    rows: int = 8

    @property
    def is_asked_for(self) -> bool:
        """Whether anything is left out on purpose."""
        return bool(self.filters) or self.exact_duplicates or self.near_duplicates


def check_select(config: SelectConfig) -> None:
    """Raises ValueError where a value is impossible."""
    for key in ("ngram", "bands", "rows"):
        if getattr(config, key) < 1:
            raise ValueError(f"data.select.{key}={getattr(config, key)} must be at least 1")


def check_can_select(config: SelectConfig) -> None:
    """Raises ValueError where datatrove is missing or has no such option.

    Only preparing needs this: a corpus that is ready is read without datatrove.
    """
    if not (config.filters or config.near_duplicates):
        return
    if find_spec("datatrove") is None:
        raise ValueError(
            "data.select.filters and data.select.near_duplicates need datatrove, which is not "
            "installed; pip install 'thrifty[select]'"
        )
    from data.quality import QualityFilters

    QualityFilters(config.filters)
