"""From the pieces of a row to its tokens, targets and positions.

B rows, S = seq_len.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.fim import FimSetting, Part
from data.mixture import Row
from data.packing import Piece
from data.samples import IGNORED, Sample
from data.source import Source
from data.token_stream import TokenStream

Ids = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """Sequences of one length, arrays of [B, S]."""

    tokens: Ids
    targets: Ids  # the next token of the same document, or IGNORED
    positions: Ids
    is_real: npt.NDArray[np.bool_]  # False at padding
    document_lengths: list[int]  # attention segments in the order of [B*S]


def stack_rows(samples: list[Sample]) -> Rows:
    """Ready samples as rows."""
    return Rows(
        np.stack([sample.tokens for sample in samples]),
        np.stack([sample.targets for sample in samples]),
        np.stack([sample.positions for sample in samples]),
        np.stack([sample.is_real for sample in samples]),
        [length for sample in samples for length in sample.document_lengths],
    )


def fill_rows(
    rows: list[Row],
    sources: dict[str, Source],
    *,
    seq_len: int,
    pad_id: int,
    mask_documents: bool,
    reset_positions: bool,
) -> Rows:
    """The rows' content, read from the sources.

    A piece that goes on in another row has that row's first token as its last target, so every
    token but a document's first is a target exactly once. A document that began in an earlier row
    is treated as if it began here.
    """
    size = len(rows) * seq_len
    tokens, targets = np.empty(size + 1, np.int64), np.empty(size, np.int64)
    is_real = np.ones(size, np.bool_)
    starts: list[int] = []
    ends: list[int] = []  # places whose target is not the token that follows in the row
    last_targets: list[int] = []
    prompts: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        at, row_end = number * seq_len, (number + 1) * seq_len
        source = sources[row.source]
        for piece in row.pieces:
            starts.append(at)
            end = at + piece.length
            following = read_piece(source, row.fim, piece, tokens[at:end])
            if mask_documents or end == row_end or following is not None:
                ends.append(end - 1)
                last_targets.append(IGNORED if following is None else following)
            prompt = prompt_length(source, row.fim, piece.place)
            hidden = min(prompt - 1 - piece.offset, piece.length)
            if hidden > 0:
                prompts.append((at, at + hidden))
            at = end
        if at < row_end:
            starts.append(at)
            ends.append(at - 1)
            last_targets.append(IGNORED)
            tokens[at:row_end] = pad_id
            is_real[at:row_end] = False
    targets[:] = tokens[1:]
    targets[ends] = last_targets
    for start, stop in prompts:
        targets[start:stop] = IGNORED
    if not is_real.all():
        targets[~is_real] = IGNORED
    shape = len(rows), seq_len
    lengths = np.diff([*starts, size])
    row_starts = np.arange(0, size, seq_len)
    from_starts = np.arange(size) - np.repeat(starts, lengths)
    in_row = np.arange(size) % seq_len
    return Rows(
        tokens[:-1].reshape(shape),
        targets.reshape(shape),
        (from_starts if reset_positions else in_row).reshape(shape),
        is_real.reshape(shape),
        lengths.tolist() if mask_documents else [seq_len] * len(row_starts),
    )


def read_piece(source: Source, fim: FimSetting, piece: Piece, row: Ids) -> int | None:
    """Fill `row` with the piece's tokens; returns its document's next token, None at its end."""
    assert source.stream is not None
    block, at = source.find(piece.place, fim)
    if block.is_rearranged[at]:
        parts = source.arrange(piece.place, fim)
        return _read_parts(source.stream, parts, block.starts[at], piece, row)
    start, stop = block.starts[at] + piece.offset, block.starts[at] + block.stored[at]
    source.stream.read_into(row, start)
    following = start + piece.length
    return source.stream.token(following) if following < stop else None


def _read_parts(
    stream: TokenStream, parts: list[Part], document_start: int, piece: Piece, row: Ids
) -> int | None:
    """The same for a document that is read in parts."""
    skip, at = piece.offset, 0
    for part in parts:
        size = 1 if isinstance(part, int) else part[1] - part[0]
        if skip >= size:
            skip -= size
            continue
        if at == len(row):
            return part if isinstance(part, int) else stream.token(document_start + part[0] + skip)
        if isinstance(part, int):
            row[at] = part
            taken = 1
        else:
            taken = min(size - skip, len(row) - at)
            stream.read_into(row[at : at + taken], document_start + part[0] + skip)
            if skip + taken < size:
                return stream.token(document_start + part[0] + skip + taken)
        skip, at = 0, at + taken
    return None


def prompt_length(source: Source, fim: FimSetting, place: int) -> int:
    """Tokens of the document at a place, from its first, that nothing is learnt from."""
    block, at = source.find(place, fim)
    return block.prompts[at]
