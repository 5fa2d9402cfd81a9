"""The work of one tokenization process: documents in, a shard of each split out.

Imports little, because every worker process starts by importing this.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data.atomic_file import read_json, write_json
from data.document import Document, Ids, Prompted, Tokens
from data.manifest import FileRecord, ShardRecord, Split, read_shard_record
from data.shard_pool import hash_documents
from data.shards import bin_path, idx_path, write_shard
from data.tokenizer import Tokenizer, load_tokenizer

RECORDS = "finished_shards"
EMPTY = "empty"
LONGEST_PIECE = 1_000_000  # characters that are tokenized at once


@dataclass(slots=True, frozen=True)
class EncodedShard:
    """A finished shard of each split; None where no document fell to the split."""

    text_sha256: str
    left_out: dict[str, int]  # documents by the reason why they are not stored
    words: dict[str, int]  # of each split's documents, prompts included; whitespace parts words
    whole_bytes: dict[str, int]  # likewise
    train: ShardRecord | None
    validation: ShardRecord | None


class ShardEncoder:
    """Encodes the shards of one corpus, in any process."""

    def __init__(self, folder: Path, tokenizer_path: Path, validation_fraction: float) -> None:
        self._folder = folder
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._validation_fraction = validation_fraction

    def work(self, number: int, documents: list[Document]) -> EncodedShard:
        """Writes the shard's files, and last of all the record that says that it is finished.

        Each document becomes bos, its tokens, eos; what is left out is counted.
        """
        splits: dict[Split, list[Document]] = {split: [] for split in Split}
        left_out: Counter[str] = Counter()
        for document in documents:
            reason = document.left_out or (None if document.text else EMPTY)
            if reason is None:
                splits[split_of(document, self._validation_fraction)].append(document)
            else:
                left_out[reason] += 1
        encoded = EncodedShard(
            text_sha256=hash_documents(documents),
            left_out=dict(sorted(left_out.items())),
            words={
                split: sum(len(document.whole.split()) for document in kept)
                for split, kept in splits.items()
            },
            whole_bytes={
                split: sum(document.num_bytes for document in kept)
                for split, kept in splits.items()
            },
            train=self._write(Split.train, number, splits[Split.train]),
            validation=self._write(Split.validation, number, splits[Split.validation]),
        )
        write_json(record_path(self._folder, number), asdict(encoded))
        return encoded

    def read_kept(self, number: int) -> EncodedShard | None:
        """The record of a finished shard, None for one that is not."""
        path = record_path(self._folder, number)
        if not path.is_file():
            return None
        content = read_json(path)
        splits: dict[str, Any] = {
            split: read_shard_record(content[split]) if content[split] is not None else None
            for split in Split
        }
        return EncodedShard(**(content | splits))

    def _write(self, split: Split, number: int, documents: list[Document]) -> ShardRecord | None:
        if not documents:
            return None
        prefix = self._folder / f"{split}-{number:05d}"
        ids = (encode_document(self._tokenizer, document) for document in documents)
        summary = write_shard(prefix, ids, vocab_size=self._tokenizer.size)
        return ShardRecord(
            name=prefix.name,
            documents=summary.documents,
            tokens=summary.tokens,
            prompt_tokens=summary.prompt_tokens,
            text_bytes=sum(len(document.text) for document in documents),
            bin=FileRecord(bin_path(prefix).name, summary.bin_bytes, summary.bin_sha256),
            idx=FileRecord(idx_path(prefix).name, summary.idx_bytes, summary.idx_sha256),
        )


def encode_document(tokenizer: Tokenizer, document: Document) -> Ids:
    """A document as it is stored: bos, the prompt's tokens if any, the text's, eos."""
    bos: list[Tokens] = [[tokenizer.bos_id]]
    eos: list[Tokens] = [[tokenizer.eos_id]]
    text = encode_pieces(tokenizer, document.text.decode())
    if document.prompt is None:
        return join([*bos, *text, *eos])
    return Prompted(
        join([*bos, *encode_pieces(tokenizer, document.prompt.decode())]), join([*text, *eos])
    )


def encode_pieces(tokenizer: Tokenizer, text: str) -> Iterator[Tokens]:
    """The text's ids in pieces; a very long text is tokenized so, to bound the memory it takes."""
    if len(text) <= LONGEST_PIECE:
        yield tokenizer.encode(text)
        return
    start = 0
    while start < len(text):
        stop = start + LONGEST_PIECE
        if stop < len(text):  # after a line or before a word if there is one, else anywhere
            newline = text.rfind("\n", start, stop) + 1
            stop = newline or max(text.rfind(" ", start + 1, stop), 0) or stop
        yield np.array(tokenizer.encode(text[start:stop]), np.int32)
        start = stop


def join(pieces: list[Tokens]) -> Tokens:
    """All ids in a row."""
    if any(isinstance(piece, np.ndarray) for piece in pieces):
        return np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
    return list(chain.from_iterable(pieces))


def split_of(document: Document, validation_fraction: float) -> Split:
    """The split of a document; its prompt counts too."""
    before = document.prompt + b"\0" if document.prompt else b""
    return choose_split(before + document.text, validation_fraction)


def choose_split(document: bytes, validation_fraction: float) -> Split:
    """The split of a document by the hash of its text, whatever else the corpus holds."""
    digest = blake2b(document, digest_size=8, person=b"split").digest()
    held_out = int.from_bytes(digest) < validation_fraction * 2**64
    return Split.validation if held_out else Split.train


def record_path(folder: Path, number: int) -> Path:
    """Where a finished shard is recorded until the whole corpus is finished."""
    return folder / RECORDS / f"{number:05d}.json"


def clear_records(folder: Path) -> None:
    """Removes what is kept of finished shards, so that all are made again if need be."""
    for path in (folder / RECORDS).glob("*"):
        path.unlink()
    if (folder / RECORDS).is_dir():
        (folder / RECORDS).rmdir()
