"""Token shards in Megatron-Core's format: `NAME.bin` holds the tokens, `NAME.idx` where they lie.

The index, little-endian without padding (megatron/core/datasets/indexed_dataset.py):

    magic "MMIDIDX\\0\\0", version u64 = 1, dtype code u8, sequences N u64, documents + 1 D u64,
    sequence lengths i32[N], byte offsets of the sequences i64[N], first sequence of each
    document i64[D], the last of them N.

We write each document as one sequence, bos first and eos last; one with a prompt as two, the
prompt and the rest. Datatrove's `.ds` files are read as well (`data/datatrove_index.py`).
"""

import struct
from bisect import bisect_left
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.atomic_file import write_aside
from data.datatrove_index import SUFFIX as DATATROVE
from data.datatrove_index import DatatroveIndex
from data.document import Ids, Prompted

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
UINT16, INT32 = 8, 4


class ShardSummary(NamedTuple):
    """What a finished shard holds, and how its files are recognised."""

    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    prompt_tokens: int


def choose_dtype(vocab_size: int) -> int:
    """The code of the smallest type for ids, with the bound that Megatron uses."""
    return UINT16 if vocab_size < 65500 else INT32


def bin_path(prefix: Path) -> Path:
    """The file that holds the tokens."""
    return prefix if prefix.suffix == DATATROVE else prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The file that holds the index."""
    suffix = ".index" if prefix.suffix == DATATROVE else ".idx"
    return prefix.with_name(prefix.name + suffix)


def write_shard(prefix: Path, documents: Iterable[Ids], *, vocab_size: int) -> ShardSummary:
    """Streams documents of token ids to `prefix`.bin and .idx, each complete or absent.

    The index is renamed last, so a shard with an index is whole.
    """
    code = choose_dtype(vocab_size)
    dtype = DTYPES[code]
    lengths: list[int] = []  # of sequences
    borders = [0]  # the first sequence of each document, and the end
    prompt_tokens = 0
    digest = sha256()
    with write_aside(bin_path(prefix)) as file:
        for ids in documents:
            sequences = ids if isinstance(ids, Prompted) else (ids,)
            for sequence in sequences:
                encoded = np.asarray(sequence, dtype).tobytes()
                lengths.append(len(sequence))
                digest.update(encoded)
                file.write(encoded)
            borders.append(len(lengths))
            prompt_tokens += len(ids.prompt) if isinstance(ids, Prompted) else 0
    index = _build_index(np.asarray(lengths, "<i4"), np.asarray(borders, "<i8"), code)
    with write_aside(idx_path(prefix)) as file:
        file.write(index)
    tokens = sum(lengths)
    return ShardSummary(
        documents=len(borders) - 1,
        tokens=tokens,
        bin_bytes=tokens * dtype.itemsize,
        bin_sha256=digest.hexdigest(),
        idx_bytes=len(index),
        idx_sha256=sha256(index).hexdigest(),
        prompt_tokens=prompt_tokens,
    )


def _build_index(
    lengths: npt.NDArray[np.int32], borders: npt.NDArray[np.int64], code: int
) -> bytes:
    ends = np.cumsum(lengths, dtype="<i8") * DTYPES[code].itemsize
    offsets = np.concatenate([np.zeros(1, "<i8"), ends])[:-1]
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(borders))
    return header + lengths.tobytes() + offsets.astype("<i8").tobytes() + borders.tobytes()


class MegatronIndex:
    """The index of one shard, memory-mapped; opening it costs the same whatever its size.

    Raises:
        ValueError: The file is no Megatron index or is cut short.
    """

    def __init__(self, index_path: Path) -> None:
        with open(index_path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{index_path} is not a Megatron index: its first bytes are wrong")
        _, version, code, num_sequences, num_borders = HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise ValueError(
                f"{index_path} has version {version} and type code {code}; "
                f"version 1 and one of {', '.join(map(str, DTYPES))} can be read"
            )
        size = index_path.stat().st_size
        if size < HEADER.size + 12 * num_sequences + 8 * num_borders:
            raise ValueError(f"{index_path} is cut short: {size} bytes for {num_sequences} items")
        index = np.memmap(index_path, np.uint8, mode="r")
        offsets_at = HEADER.size + 4 * num_sequences
        borders_at = offsets_at + 8 * num_sequences
        # Megatron does not align these, so whole-array operations would copy them: use single
        # items only.
        self._offsets = index[offsets_at:borders_at].view("<i8")
        self._borders = index[borders_at : borders_at + 8 * num_borders].view("<i8")
        self._num_sequences = num_sequences
        self.num_documents: int = max(num_borders - 1, 0)
        self.dtype = DTYPES[code]
        last = index[offsets_at - 4 : offsets_at].view("<i4")
        self.num_tokens = 0
        if num_sequences:
            self.num_tokens = int(self._offsets[-1]) // self.dtype.itemsize + int(last[0])

    def document_start(self, document: int) -> int:
        """The place of the document's first token."""
        sequence = int(self._borders[document])
        if sequence == self._num_sequences:
            return self.num_tokens
        return int(self._offsets[sequence]) // self.dtype.itemsize

    def all_starts(self) -> npt.NDArray[np.int64]:
        """The place of every document's first token, and the end, [num_documents + 1]."""
        return np.asarray(self._all_places()[self._borders.copy()], np.int64)

    def prompt_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every document's first sequence where it has two, else 0, [num_documents]."""
        borders = self._borders.copy()
        has_prompt = np.diff(borders) == 2
        places = self._all_places()
        firsts = places[np.minimum(borders[:-1] + 1, self._num_sequences)] - places[borders[:-1]]
        return np.where(has_prompt, firsts, 0).astype(np.int32)

    def count_hidden(self) -> int:
        """Tokens that a mask hides; this format has none."""
        return 0

    def _all_places(self) -> npt.NDArray[np.int64]:
        """The place of every sequence's first token, and the end."""
        return np.append(self._offsets.copy() // self.dtype.itemsize, self.num_tokens)


class Shard:
    """A memory-mapped shard; opening it costs the same whatever its size.

    Raises:
        ValueError: The files are no shard or do not fit together.
    """

    def __init__(self, prefix: Path) -> None:
        tokens_path, index_path = bin_path(prefix), idx_path(prefix)
        self._index: MegatronIndex | DatatroveIndex
        if prefix.suffix == DATATROVE:
            self._index = DatatroveIndex(tokens_path, index_path)
        else:
            self._index = MegatronIndex(index_path)
        self.num_documents: int = self._index.num_documents
        self.tokens: npt.NDArray[np.integer[Any]] = np.zeros(0, self._index.dtype)
        """All tokens of the shard, [num_tokens]."""
        if tokens_path.stat().st_size:  # what is empty can't be mapped
            self.tokens = np.memmap(tokens_path, self._index.dtype, mode="r")
        if len(self.tokens) != self._index.num_tokens:
            raise ValueError(
                f"{tokens_path} holds {len(self.tokens)} tokens, its index says "
                f"{self._index.num_tokens}"
            )
        self.document_start = self._index.document_start
        self.all_starts = self._index.all_starts
        self.prompt_lengths = self._index.prompt_lengths
        self.count_hidden = self._index.count_hidden

    def document_starts(self, start: int, stop: int) -> list[int]:
        """Places in [start, stop) where a document begins, by binary search in the index."""
        documents = range(self.num_documents)
        document = bisect_left(documents, start, key=self.document_start)
        starts: list[int] = []
        while document < self.num_documents:
            place = self.document_start(document)
            if place >= stop:
                break
            if not starts or starts[-1] != place:  # other tools may store empty documents
                starts.append(place)
            document += 1
        return starts
