"""Held-out samples are the stream cut in pieces, in its order."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import Verify
from data.joined_split import JoinedSplit, Part
from data.manifest import Split
from data.prepare import Prepared
from data.samples import IGNORED, Samples, pack
from data.shards import Shard
from data.token_stream import TokenStream


class Reference(NamedTuple):
    """A whole split in memory: each token and the number of its document."""

    tokens: list[int]
    document_ids: list[int]


@pytest.fixture(scope="module")
def reference(prepared: Prepared) -> Reference:
    tokens: list[int] = []
    document_ids: list[int] = []
    bos_id = prepared.manifest.tokenizer.bos_id
    for record in prepared.manifest.train.shards:
        for token in Shard(prepared.folder / record.name).tokens.tolist():
            document_ids.append((document_ids[-1] if tokens else -1) + (token == bos_id))
            tokens.append(token)
    return Reference(tokens, document_ids)


@pytest.fixture(scope="module")
def stream(prepared: Prepared) -> TokenStream:
    return TokenStream(prepared.folder, Split.train, verify=Verify.full)


def open_train(stream: TokenStream, seq_len: int = 32) -> Samples:
    return Samples(
        JoinedSplit([Part(stream)]),
        seq_len=seq_len,
        mask_documents=True,
        reset_positions=True,
    )


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_stream_is_the_shards_in_a_row(
    stream: TokenStream, reference: Reference, data: st.DataObject
) -> None:
    size = len(reference.tokens)
    assert len(stream) == size
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    assert stream.read(start, stop).tolist() == reference.tokens[start:stop]
    ids = [-1, *reference.document_ids]
    expected = [place for place in range(start, stop) if ids[place + 1] != ids[place]]
    assert stream.document_starts(start, stop) == expected


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("reset_positions", [False, True])
@pytest.mark.parametrize("seq_len", [1, 7, 64, 700])
def test_a_sample_equals_a_loop_over_its_tokens(
    stream: TokenStream,
    reference: Reference,
    mask_documents: bool,
    reset_positions: bool,
    seq_len: int,
) -> None:
    samples = Samples(
        JoinedSplit([Part(stream)]),
        seq_len=seq_len,
        mask_documents=mask_documents,
        reset_positions=reset_positions,
    )
    assert samples.num_samples == (len(reference.tokens) - 1) // seq_len
    for index in range(0, samples.num_samples, max(1, samples.num_samples // 40)):
        sample = samples[index]
        start = index * seq_len
        tokens = reference.tokens[start : start + seq_len + 1]
        ids = reference.document_ids[start : start + seq_len + 1]
        targets: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        for place in range(seq_len):
            border = place == 0 or ids[place] != ids[place - 1]
            crosses = ids[place + 1] != ids[place]
            targets.append(IGNORED if mask_documents and crosses else tokens[place + 1])
            positions.append(0 if place == 0 or (border and reset_positions) else positions[-1] + 1)
            if place == 0 or (border and mask_documents):
                lengths.append(0)
            lengths[-1] += 1
        assert sample.tokens.tolist() == tokens[:-1]
        assert sample.targets.tolist() == targets
        assert sample.positions.tolist() == positions
        assert sample.document_lengths == lengths
        assert sample.is_real.all()


def test_padding_has_no_targets(stream: TokenStream) -> None:
    padding = open_train(stream, 5).padding()
    assert padding.targets.tolist() == [IGNORED] * 5
    assert padding.tokens.tolist() == [stream.tokenizer.pad_id] * 5
    assert padding.document_lengths == [5]
    assert not padding.is_real.any()


def test_a_border_at_the_last_token_hides_the_last_target() -> None:
    sample = pack(np.arange(5), [4], mask_documents=True, reset_positions=True)
    assert sample.targets.tolist() == [1, 2, 3, IGNORED]
    assert sample.document_lengths == [4]


def test_a_split_shorter_than_a_sample_is_refused(stream: TokenStream) -> None:
    size = len(stream)
    assert open_train(stream, size - 1).num_samples == 1
    with pytest.raises(
        ValueError, match=rf"data\.seq_len={size} needs {size + 1} tokens, the split"
    ):
        open_train(stream, size)
