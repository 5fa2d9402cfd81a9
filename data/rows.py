"""From the pieces of rows to their tokens, targets and positions.

B rows, S = seq_len, P pieces.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.fim import FimSetting
from data.gather import Gather, Tokens
from data.mixture import Row
from data.remote_file import RemoteTokens, Wanted, fetch
from data.samples import IGNORED, Sample
from data.source import Source

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


def read_rows(
    rows: Sequence[Row],
    sources: dict[str, Source],
    gather: Gather,
    *,
    batch_size: int,
    seq_len: int,
    pad_id: int,
    mask_documents: bool,
    reset_positions: bool,
) -> list[Rows]:
    """The rows' content in batches of so many, read from the sources.

    A piece that goes on in another row has that row's first token as its last target, so every
    token but a document's first is a target exactly once. A document that began in an earlier row
    is treated as if it began here.

    Raises:
        OSError: A shard can't be read.
    """
    located = _locate(rows, sources)
    _fetch(located, sources)
    dtype = np.result_type(*{sources[row.source].dtype for row in rows})
    # One piece of memory for all: many small ones go back to the system and come back as new pages.
    numbers = np.empty((3, len(rows), seq_len), np.int64)
    all_real = np.ones((len(rows), seq_len), np.bool_)
    counting = np.arange(seq_len)
    batches: list[Rows] = []
    for start in range(0, len(rows), batch_size):
        some = slice(start, start + batch_size)
        (tokens, targets, positions), is_real = numbers[:, some], all_real[some]
        flat = tokens.reshape(-1), targets.reshape(-1)
        try:  # rearranged documents are read while rows are laid out
            layout = _lay_out(located[some], seq_len, pad_id, dtype)
            _fill(layout, gather, *flat, seq_len, is_masked=mask_documents)
            _hide(located[some], gather, flat[1], seq_len)
        except OSError as error:
            raise OSError(_find_fault(located[some]) or str(error)) from error
        for first, last in layout.padding:
            is_real.reshape(-1)[first:last] = False
        whole = [seq_len] * len(tokens)
        runs = layout.lengths if reset_positions else whole
        np.concatenate([counting[:length] for length in runs], out=positions.reshape(-1))
        lengths = layout.lengths if mask_documents else whole
        batches.append(Rows(tokens, targets, positions, is_real, lengths))
    return batches


class _Group(NamedTuple):
    """Pieces of rows of one window, and where they lie: lists of [P]."""

    source: Source
    fim: FimSetting
    places: list[int]
    offsets: list[int]
    lengths: list[int]
    shards: list[int]
    starts: list[int]  # in the shard, of pieces that are read as they are stored
    goes_on: list[bool]  # whether the document does, after the piece
    hidden: list[int]  # targets, from the piece's first, that predict a prompt; or negative
    is_rearranged: list[bool]


_Located = tuple[_Group, range]
"""The pieces of one row: their group, and which of it."""


def _locate(rows: Sequence[Row], sources: dict[str, Source]) -> list[_Located]:
    """Each row's pieces; rows of one window are looked up together."""
    by_window: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_window.setdefault(id(row.packed), []).append(index)
    located: dict[int, _Located] = {}
    for indices in by_window.values():
        row = rows[indices[0]]
        source = sources[row.source]
        assert source.stream is not None
        numbers = np.array([rows[index].number for index in indices])
        (places, offsets, lengths), counts = row.packed.find(numbers)
        at, documents = places - row.window.start, row.documents
        fields = (
            places,
            offsets,
            lengths,
            # A rearranged document is longer than it is stored: offsets lead past its shard's end.
            *source.stream.locate(documents.starts[at] + offsets * ~documents.is_rearranged[at]),
            offsets + lengths < documents.lengths[at],
            np.minimum(documents.prompts[at] - 1 - offsets, lengths),
            documents.is_rearranged[at],
        )
        group = _Group(source, row.fim, *(field.tolist() for field in fields))
        first = 0
        for index, count in zip(indices, counts.tolist(), strict=True):
            located[index] = group, range(first, first + count)
            first += count
    return [located[index] for index in range(len(rows))]


def _fetch(rows: list[_Located], sources: dict[str, Source]) -> None:
    """Bring here what lies in remote shards, instead of what earlier rows needed: in one request,
    or two where documents are rearranged, since their first and last tokens say how."""
    for source in sources.values():
        assert source.stream is not None
        source.stream.drop_fetched()
    first: list[Wanted] = []
    rearranged: list[tuple[_Group, int]] = []
    for group, pieces in rows:
        stream = group.source.stream
        assert stream is not None
        for k in pieces if stream.is_remote else ():
            tokens, start = stream.tokens(group.shards[k]), group.starts[k]
            if isinstance(tokens, RemoteTokens):
                if group.is_rearranged[k]:
                    rearranged.append((group, k))
                    first += _ends(group, k)
                else:
                    first.append((tokens, start, start + group.lengths[k] + group.goes_on[k]))
    fetch(first)
    fetch(wanted for group, k in rearranged for wanted in _parts(group, k))


def _ends(group: _Group, k: int) -> list[Wanted]:
    """The first and the last token of the document that a piece is of."""
    block, at = group.source.find(group.places[k], group.fim)
    start, stored = int(block.starts[at]), int(block.stored[at])
    return _find_remote(group, [(start, start + 1), (start + stored - 1, start + stored)])


def _parts(group: _Group, k: int) -> list[Wanted]:
    """Where a piece of a rearranged document, and the token after it, are stored."""
    count = group.lengths[k] + group.goes_on[k]
    parts = group.source.parts(group.places[k], group.offsets[k], count, group.fim)
    return _find_remote(group, [part for part in parts if not isinstance(part, int)])


def _find_remote(group: _Group, ranges: list[tuple[int, int]]) -> list[Wanted]:
    assert group.source.stream is not None
    found: list[Wanted] = []
    for start, stop in ranges:
        tokens, place = group.source.stream.find(start)
        assert isinstance(tokens, RemoteTokens)
        found.append((tokens, place, place + stop - start))
    return found


def _find_fault(rows: list[_Located]) -> str | None:
    """What is wrong with the shards of rows that can't be read."""
    for group, pieces in rows:
        assert group.source.stream is not None
        shards = set(group.shards[pieces.start : pieces.stop])
        if (fault := group.source.stream.find_fault(shards)) is not None:
            return fault
    return None


class _Layout(NamedTuple):
    """Rows, one after another; places count through all of them."""

    views: list[Tokens]  # of all their tokens, padding included
    following: list[Tokens]  # of the tokens after pieces whose documents go on
    lengths: list[int]  # of documents and padding
    ends: list[int]  # each piece's last place
    goes_on: list[bool]  # whether its document does
    prompts: list[tuple[int, int]]  # places [start, stop) without a target
    padding: list[tuple[int, int]]


def _lay_out(rows: list[_Located], seq_len: int, pad_id: int, dtype: np.dtype[Any]) -> _Layout:
    """Where everything of these rows lies, still unread but for rearranged documents."""
    layout = _Layout([], [], [], [], [], [], [])
    views, following, all_lengths, ends, all_goes_on, prompts, padding = layout
    row_end = 0
    for group, pieces in rows:
        at, row_end = row_end, row_end + seq_len
        source, fim, places, offsets, lengths, shards, starts, goes_on, hidden, rearranged = group
        stream = source.stream
        assert stream is not None
        first_view, first_following = len(views), len(following)
        for k in pieces:
            length = lengths[k]
            if rearranged[k]:
                offset = offsets[k]
                views += source.view(places[k], offset, length, fim)
                following += source.view(places[k], offset + length, int(goes_on[k]), fim)
            else:
                tokens, stop = stream.tokens(shards[k]), starts[k] + length
                views.append(tokens[starts[k] : stop])
                if goes_on[k]:
                    following.append(tokens[stop : stop + 1])
            if hidden[k] >= 0:  # it begins in a prompt, and may be the target of the place before
                follows = k > pieces.start and offsets[k] > 0 and not goes_on[k - 1]
                prompts.append((at - follows, at + hidden[k]))
            at += length
            ends.append(at - 1)
        own = slice(pieces.start, pieces.stop)
        all_lengths += lengths[own]
        all_goes_on += goes_on[own]
        if source.dtype != dtype:  # sources stored in different widths
            for some, first in ((views, first_view), (following, first_following)):
                some[first:] = [view.astype(dtype) for view in some[first:]]
        if at < row_end:
            views.append(np.full(row_end - at, pad_id, dtype))
            all_lengths.append(row_end - at)
            padding.append((at, row_end))
    return layout


def _fill(
    layout: _Layout, gather: Gather, tokens: Ids, targets: Ids, seq_len: int, *, is_masked: bool
) -> None:
    """Writes the tokens and targets of rows, [B*S]."""
    gathered = gather(layout.views + layout.following)
    tokens[:] = gathered[: len(tokens)]
    targets[:-1] = tokens[1:]
    for start, stop in layout.padding:
        targets[start - 1 : stop] = IGNORED
    found = iter(gathered[len(tokens) :].tolist())
    for end, goes_on in zip(layout.ends, layout.goes_on, strict=True):
        if goes_on:
            targets[end] = next(found)
        elif is_masked or (end + 1) % seq_len == 0:
            targets[end] = IGNORED
    for start, stop in layout.prompts:
        targets[start:stop] = IGNORED


def _hide(rows: list[_Located], gather: Gather, targets: Ids, seq_len: int) -> None:
    """Takes away the targets, of [B*S], that lie in the midst of documents and are not learnt."""
    stretches: list[Tokens] = []
    places: list[int] = []  # of the first target of each
    for number, (group, pieces) in enumerate(rows):
        assert group.source.stream is not None
        if (masks := group.source.stream.masks) is None:
            continue
        at = number * seq_len
        follows = False  # whether the piece's first token is the target of the place before
        for k in pieces:
            if (mask := masks.find(group.shards[k])) is not None:
                own = follows and group.offsets[k] > 0
                last = group.starts[k] + group.lengths[k] + group.goes_on[k]
                stretches.append(mask[group.starts[k] + 1 - own : last])
                places.append(at - own)
            at += group.lengths[k]
            follows = not group.goes_on[k]
    if not stretches:
        return
    lengths = list(map(len, stretches))
    offsets = np.array(places) - np.cumsum([0, *lengths[:-1]])  # from where it is gathered
    hidden = np.flatnonzero(gather(stretches) == 0)
    targets[hidden + np.repeat(offsets, lengths)[hidden]] = IGNORED
