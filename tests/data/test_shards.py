"""Shards have Megatron's layout byte for byte, and give back what was written."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shards import Shard, write_shard

DOCUMENTS = [[1, 7, 2], [1, 2], [1, 500, 40_000, 9, 2]]


def test_the_files_are_megatrons_byte_for_byte(tmp_path: Path) -> None:
    summary = write_shard(tmp_path / "shard", DOCUMENTS, vocab_size=50_000)
    tokens = struct.pack("<10H", 1, 7, 2, 1, 2, 1, 500, 40_000, 9, 2)
    index = b"MMIDIDX\x00\x00"
    index += struct.pack("<Q", 1)  # version
    index += struct.pack("<B", 8)  # uint16
    index += struct.pack("<Q", 3)  # sequences
    index += struct.pack("<Q", 4)  # entries of the last list
    index += struct.pack("<3i", 3, 2, 5)  # lengths
    index += struct.pack("<3q", 0, 6, 10)  # byte offsets
    index += struct.pack("<4q", 0, 1, 2, 3)  # first sequence of each document, and the end
    assert (tmp_path / "shard.bin").read_bytes() == tokens
    assert (tmp_path / "shard.idx").read_bytes() == index
    assert summary[:3] == (3, 10, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard.bin", "shard.idx"]


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65_499, 2), (65_500, 4), (130_000, 4)])
def test_ids_take_two_bytes_below_megatrons_bound(
    tmp_path: Path, vocab_size: int, itemsize: int
) -> None:
    write_shard(tmp_path / "shard", [[1, vocab_size - 1]], vocab_size=vocab_size)
    assert Shard(tmp_path / "shard").tokens.tolist() == [1, vocab_size - 1]
    assert (tmp_path / "shard.bin").stat().st_size == 2 * itemsize


@given(
    documents=st.lists(st.lists(st.integers(0, 60_000), min_size=1), min_size=1),
    span=st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted),
)
def test_tokens_and_document_starts_equal_a_plain_list(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], span: list[int]
) -> None:
    prefix = tmp_path_factory.mktemp("shards") / "shard"
    write_shard(prefix, documents, vocab_size=65_000)
    shard = Shard(prefix)
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    starts = [sum(map(len, documents[:number])) for number in range(len(documents))]
    start, stop = span
    assert shard.document_starts(start, stop) == [x for x in starts if start <= x < stop]
    assert shard.num_documents == len(documents)


def test_documents_of_several_sequences_and_empty_ones_are_read(tmp_path: Path) -> None:
    """Other tools store a document as sentences, and keep empty documents."""
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, 4, 5)
    lengths, offsets = struct.pack("<4i", 2, 3, 1, 2), struct.pack("<4q", 0, 8, 20, 24)
    borders = struct.pack("<5q", 0, 2, 2, 3, 4)
    (tmp_path / "other.v1.idx").write_bytes(header + lengths + offsets + borders)
    np.arange(8, dtype="<i4").tofile(tmp_path / "other.v1.bin")
    shard = Shard(tmp_path / "other.v1")
    assert shard.tokens.tolist() == list(range(8))
    assert shard.document_starts(0, 8) == [0, 5, 6]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def documents():  # type: ignore[no-untyped-def]
        yield [1, 2]
        raise RuntimeError("the tokenizer broke")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "shard", documents(), vocab_size=10)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard", DOCUMENTS, vocab_size=50_000)
    index = (tmp_path / "shard.idx").read_bytes()
    for content, complaint in [
        (b"", "not a Megatron index"),
        (b"X" + index[1:], "not a Megatron index"),
        (index[:9] + b"\x02" + index[10:], "version 2"),
        (index[:17] + b"\x63" + index[18:], "type code 99"),
        (index[:-1], "cut short"),
    ]:
        (tmp_path / "shard.idx").write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            Shard(tmp_path / "shard")
    (tmp_path / "shard.idx").write_bytes(index)
    (tmp_path / "shard.bin").write_bytes(b"\1\0")
    with pytest.raises(ValueError, match="holds 1 tokens, its index says 10"):
        Shard(tmp_path / "shard")


def test_a_search_in_a_large_index_looks_at_few_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "shard", ([1, 2, 3] for _ in range(50_000)), vocab_size=10)
    shard = Shard(tmp_path / "shard")
    looks = 0
    document_start = shard.document_start

    def counting(document: int) -> int:
        nonlocal looks
        looks += 1
        return document_start(document)

    monkeypatch.setattr(shard, "document_start", counting)
    assert shard.document_starts(100_000, 100_010) == [100_002, 100_005, 100_008]
    assert looks < 30
