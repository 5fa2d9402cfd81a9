"""Samples for people: decoded, with borders of documents, what is learnt, and sources."""

import html
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from data.mixture import Row
from data.rows import Rows
from data.samples import IGNORED
from data.source import Source
from data.tokenizer import Tokenizer
from train.step_samples import StepSamples


class ShownPiece(NamedTuple):
    """A piece of a document; `runs` are its texts, and whether the loss is taken on them."""

    border: str
    runs: list[tuple[str, bool]]


class ShownSample(NamedTuple):
    title: str
    pieces: list[ShownPiece]
    ending: str  # what is said of padding


def describe_samples(step: int, samples: StepSamples, tokenizer: Tokenizer) -> list[ShownSample]:
    """All of a step's samples."""
    shown = []
    for index, (row, content) in enumerate(zip(samples.rows, samples.contents, strict=True)):
        number = samples.stretch.first + index
        targets = int((content.targets != IGNORED).sum())
        padding = int((~content.is_real).sum())
        title = (
            f"step {step}, sample {number:,} ({index + 1} of {samples.stretch.size}), source "
            f"{row.source}: {len(row.pieces)} pieces of documents, "
            f"{content.tokens.size - padding} tokens, {targets} targets"
        )
        source = samples.data.mixture.sources[row.source]
        pieces = list(_describe_pieces(row, content, source, tokenizer))
        shown.append(ShownSample(title, pieces, f"{padding} tokens of padding" if padding else ""))
    return shown


def _describe_pieces(
    row: Row, content: Rows, source: Source, tokenizer: Tokenizer
) -> Iterator[ShownPiece]:
    tokens, targets = content.tokens[0].tolist(), content.targets[0].tolist()
    at = 0
    for piece in row.pieces:
        inside = piece.place - row.window.start
        document, length = (
            int(array[inside]) for array in (row.documents.documents, row.documents.lengths)
        )
        epoch = piece.place // source.num_documents
        end = at + piece.length
        border = f"document {document:,}, epoch {epoch}, tokens {piece.offset:,} to "
        border += f"{piece.offset + piece.length:,} of {length:,}"
        if row.documents.is_rearranged[inside]:
            border += ", fill in the middle"
        # A token is learnt where the place before it, in the same row, predicts it.
        are_learnt = [place > 0 and targets[place - 1] != IGNORED for place in range(at, end)]
        if content.positions[0, at] == 0:
            are_learnt[0] = False
        runs = [
            (tokenizer.decode([tokens[at + k] for k in group]), is_learnt)
            for is_learnt, group in groupby(range(piece.length), key=lambda k: are_learnt[k])
        ]
        yield ShownPiece(border, runs)
        at = end


def print_samples(samples: list[ShownSample]) -> str:
    """Plain text; what no loss is taken on stands between « and »."""
    lines = []
    for sample in samples:
        lines.append(f"== {sample.title}")
        for piece in sample.pieces:
            lines.append(f"-- {piece.border}")
            lines.append("".join(text if learnt else f"«{text}»" for text, learnt in piece.runs))
        if sample.ending:
            lines.append(f"-- {sample.ending}")
        lines.append("")
    return "\n".join(lines)


def render_samples(samples: list[ShownSample]) -> str:
    """The same as the body of a page; what no loss is taken on is grey."""
    parts = []
    for sample in samples:
        parts.append(f"<h2>{html.escape(sample.title)}</h2>")
        for piece in sample.pieces:
            text = "".join(
                f"<span>{html.escape(text)}</span>"
                if is_learnt
                else f'<span class="hidden">{html.escape(text)}</span>'
                for text, is_learnt in piece.runs
            )
            parts.append(f'<p class="border">{html.escape(piece.border)}</p><pre>{text}</pre>')
        if sample.ending:
            parts.append(f'<p class="border">{html.escape(sample.ending)}</p>')
    return "\n".join(parts)
