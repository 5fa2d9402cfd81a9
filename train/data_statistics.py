"""What a run's corpora are like, and how much of each it has read."""

from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.config import find_folder, list_sources
from data.documents import Numbers, Spans
from data.position import Position, SourcePosition
from data.report import read_report
from data.select import EXACT, NEAR
from data.token_stream import TokenStream
from data.training_data import TrainingData
from train.config import RunConfig

Lengths = dict[str, int]
"""Documents by length: `64-127` and so on."""


class SourceStatistics(NamedTuple):
    name: str
    documents: int
    tokens: int
    looked_at: int  # documents, of which the following is said
    lengths: Lengths
    mean_length: float
    repeated: int  # documents that are exactly like an earlier one
    dropped: dict[str, int]  # duplicates that `prepare` found and left out; none if it didn't look
    weight: float  # as the config has it now
    read: int  # tokens
    epochs: float  # that were read


def describe_sources(
    config: RunConfig, data: TrainingData, position: Position, *, most: int
) -> list[SourceStatistics]:
    """Statistics of each source; its documents are looked at up to `most` of them, evenly."""
    found = []
    wanted = list_sources(config.data)
    total = sum(source.weight for source in wanted)
    for wish in wanted:
        source, at = data.mixture.sources[wish.name], position.sources.get(wish.name)
        at = at or SourcePosition()
        assert source.stream is not None
        step = -(-source.num_documents // most)
        documents = np.arange(0, source.num_documents, step)
        spans = source.spans(documents)
        found.append(
            SourceStatistics(
                name=wish.name,
                documents=source.num_documents,
                tokens=len(source.stream),
                looked_at=len(documents),
                lengths=_count_lengths(spans.lengths),
                mean_length=float(spans.lengths.mean()),
                repeated=_count_repeated(source.stream, spans),
                dropped=_dropped_duplicates(find_folder(wish)),
                weight=wish.weight / total,
                read=at.tokens,
                epochs=at.document / source.num_documents,
            )
        )
    return found


def _count_lengths(lengths: Numbers) -> Lengths:
    bins = np.log2(np.maximum(lengths, 1)).astype(int)
    counts = np.bincount(bins)
    first = int(bins.min())
    return {f"{2**n:,}-{2 ** (n + 1) - 1:,}": int(counts[n]) for n in range(first, len(counts))}


def _count_repeated(stream: TokenStream, spans: Spans) -> int:
    """How many of the documents have exactly the tokens of an earlier one."""
    seen: Counter[bytes] = Counter()
    for start, length in zip(spans.starts.tolist(), spans.lengths.tolist(), strict=True):
        tokens = stream.gather([stream.view(start, length)])
        seen[blake2b(tokens.tobytes(), digest_size=12).digest()] += 1
    return sum(count - 1 for count in seen.values())


def _dropped_duplicates(folder: Path) -> dict[str, int]:
    report = read_report(folder)
    dropped: dict[str, int] = {}
    for stage in report["stages"] if report else []:
        if stage["stage"] in (EXACT, NEAR):
            dropped |= stage["dropped"]
    return dropped
