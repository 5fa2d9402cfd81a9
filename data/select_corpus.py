"""Decides which documents of a corpus are kept, before anything is tokenized.

Workers examine shards; then this process compares all documents with each other, one band of
MinHash after another, so that memory holds some 50 bytes per document, however long it is.

A document is a duplicate if an *earlier* one that passes the filters has the same text, or
resembles it (that one may be left out as a duplicate too: of a chain of alike documents the first
remains). So which are kept depends on nothing but the documents and their order.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.atomic_file import write_aside
from data.config import DataConfig, count_workers
from data.corpus import read_documents
from data.document import Document
from data.encode_shard import RECORDS
from data.examine_shard import ExaminedShard, ShardExaminer
from data.progress import Advance
from data.select import EXACT, NEAR, SelectConfig, check_can_select
from data.shard_pool import cut_shards, work_on_shards

Flags = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.uint16]


class Selection(NamedTuple):
    """Why each document of the corpus is left out."""

    reasons: list[str]  # the first is "": it is kept
    codes: Codes  # of every document, its place in `reasons`, [N]
    shards: list[str]  # `hash_documents` of every shard that was examined

    def mark(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents, each with the reason why it is left out, if it is.

        Raises:
            ValueError: There are more or fewer of them than were examined.
        """
        number = -1
        for number, document in enumerate(documents):
            if number >= len(self.codes):
                break
            reason = self.reasons[self.codes[number]]
            yield document._replace(left_out=reason) if reason else document
        if number + 1 != len(self.codes):
            raise ValueError(
                f"the corpus had {len(self.codes)} documents when they were selected, and has "
                "other ones now; run prepare again, which begins anew"
            )

    def refuse_other_text(self, shards: list[str]) -> None:
        """Raises ValueError where what was tokenized is not what was selected."""
        if shards != self.shards:
            raise ValueError(
                "the corpus has changed since its documents were selected; run prepare again, "
                "which begins anew"
            )


def select_documents(config: DataConfig, *, folder: Path, advance: Advance) -> Selection:
    """Which documents are kept; what a killed run has found is used.

    Raises:
        ValueError, RuntimeError: See `work_on_shards`.
    """
    path = folder / RECORDS / "selection.npz"
    if path.is_file():
        with np.load(path) as kept:
            return Selection(kept["reasons"].tolist(), kept["codes"], kept["shards"].tolist())
    check_can_select(config.select)
    shards = work_on_shards(
        cut_shards(read_documents(config), config.shard_bytes),
        partial(ShardExaminer, folder, config.select),
        num_workers=count_workers(config),
        advance=advance,
    )
    selection = compare(config.select, shards)
    with write_aside(path) as file:
        np.savez(file, **selection._asdict())
    for shard in shards:
        shard.findings.unlink()
    return selection


def compare(config: SelectConfig, shards: list[ExaminedShard]) -> Selection:
    """The selection that follows from what was found in each shard."""
    reasons = ["", EXACT, NEAR]
    codes = _join_codes(shards, reasons)
    left = codes == 0
    if config.exact_duplicates and shards:
        repeated = find_repeated(_read(shards, "text_hash"), left)
        codes[repeated] = reasons.index(EXACT)
        left &= ~repeated
    if config.near_duplicates and shards:
        left &= _read(shards, "has_bands")
        alike = np.zeros_like(left)
        for band in range(config.bands):
            alike |= find_repeated(_read(shards, f"band_{band}"), left)
        codes[alike] = reasons.index(NEAR)
    return Selection(reasons, codes, [shard.text_sha256 for shard in shards])


def find_repeated(keys: npt.NDArray[np.uint64], candidates: Flags) -> Flags:
    """Which candidates have a key that an earlier candidate has; keys are [N] or [N, words]."""
    repeated = np.zeros_like(candidates)
    numbers = np.flatnonzero(candidates)
    if len(numbers) > 0:
        wanted = keys[numbers].reshape(len(numbers), -1)
        order = np.lexsort(wanted.T)  # stable: of equal keys the earliest comes first
        is_repeated = (wanted[order[1:]] == wanted[order[:-1]]).all(axis=1)
        repeated[numbers[order[1:][is_repeated]]] = True
    return repeated


def _join_codes(shards: list[ExaminedShard], reasons: list[str]) -> Codes:
    """Every document's place in `reasons`, which is made longer where a shard has others, [N]."""
    pieces = [np.zeros(0, np.uint16)]
    for shard in shards:
        with np.load(shard.findings) as found:
            names = found["reasons"].tolist()
            reasons += [name for name in names if name not in reasons]
            places = np.array([reasons.index(name) for name in names], np.uint16)
            pieces.append(places[found["codes"]])
    return np.concatenate(pieces)


def _read(shards: list[ExaminedShard], name: str) -> npt.NDArray[Any]:
    """One finding of all documents, [N, ...]."""
    pieces = []
    for shard in shards:
        with np.load(shard.findings) as found:
            pieces.append(found[name])
    return np.concatenate(pieces)
