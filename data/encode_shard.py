"""The work of one tokenization process: documents in, a shard of each split out.

Imports little, because every worker process starts by importing this.
"""

import os
import signal
import threading
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from multiprocessing import parent_process
from pathlib import Path

from data.atomic_file import read_json, write_json
from data.document import Document, Ids, Prompted
from data.manifest import FileRecord, ShardRecord, Split, read_shard_record
from data.shards import bin_path, idx_path, write_shard
from data.tokenizer import Tokenizer, load_tokenizer

RECORDS = "finished_shards"


@dataclass(slots=True, frozen=True)
class EncodedShard:
    """A finished shard of each split; None where no document fell to the split."""

    text_sha256: str
    empty_documents: int
    train: ShardRecord | None
    validation: ShardRecord | None


class ShardEncoder:
    """Encodes the shards of one corpus, in any process."""

    def __init__(self, folder: Path, tokenizer_path: Path, validation_fraction: float) -> None:
        self._folder = folder
        self._tokenizer = load_tokenizer(tokenizer_path)
        self._validation_fraction = validation_fraction

    def encode(self, number: int, documents: list[Document]) -> EncodedShard:
        """Writes the shard's files, and last of all the record that says that it is finished.

        Each document becomes bos, its tokens, eos; empty ones are counted and left out.
        """
        splits: dict[Split, list[Document]] = {Split.train: [], Split.validation: []}
        for document in documents:
            if document.text:
                splits[split_of(document, self._validation_fraction)].append(document)
        encoded = EncodedShard(
            text_sha256=hash_documents(documents),
            empty_documents=sum(not document.text for document in documents),
            train=self._write(Split.train, number, splits[Split.train]),
            validation=self._write(Split.validation, number, splits[Split.validation]),
        )
        write_json(record_path(self._folder, number), asdict(encoded))
        return encoded

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
    text = [*tokenizer.encode(document.text.decode()), tokenizer.eos_id]
    if document.prompt is None:
        return [tokenizer.bos_id, *text]
    return Prompted([tokenizer.bos_id, *tokenizer.encode(document.prompt.decode())], text)


def split_of(document: Document, validation_fraction: float) -> Split:
    """The split of a document; its prompt counts too."""
    before = document.prompt + b"\0" if document.prompt else b""
    return choose_split(before + document.text, validation_fraction)


def choose_split(document: bytes, validation_fraction: float) -> Split:
    """The split of a document by the hash of its text, whatever else the corpus holds."""
    digest = blake2b(document, digest_size=8, person=b"split").digest()
    held_out = int.from_bytes(digest) < validation_fraction * 2**64
    return Split.validation if held_out else Split.train


def hash_documents(documents: list[Document]) -> str:
    """sha256 of the documents and of where they end."""
    digest = sha256()
    for document in documents:
        for part in (document.text, document.prompt or b""):
            digest.update(len(part).to_bytes(8))
            digest.update(part)
    return digest.hexdigest()


def record_path(folder: Path, number: int) -> Path:
    """Where a finished shard is recorded until the whole corpus is finished."""
    return folder / RECORDS / f"{number:05d}.json"


def clear_records(folder: Path) -> None:
    """Removes the records of finished shards, so that all are encoded again if need be."""
    for path in (folder / RECORDS).glob("*.json*"):
        path.unlink()
    if (folder / RECORDS).is_dir():
        (folder / RECORDS).rmdir()


def read_record(folder: Path, number: int) -> EncodedShard | None:
    """The record of a finished shard, None for one that is not."""
    path = record_path(folder, number)
    if not path.is_file():
        return None
    content = read_json(path)
    splits = {
        split: read_shard_record(content[split]) if content[split] is not None else None
        for split in ("train", "validation")
    }
    return EncodedShard(**content | splits)


# A process pool hands its workers functions, not objects: each worker keeps its one encoder here.
_encoder: ShardEncoder


def start_worker(folder: Path, tokenizer_path: Path, validation_fraction: float) -> None:
    """Prepares this worker process, and ties its life to that of the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent answers it
    global _encoder
    _encoder = ShardEncoder(folder, tokenizer_path, validation_fraction)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def encode_in_worker(number: int, documents: list[Document]) -> EncodedShard:
    """`ShardEncoder.encode` in a worker process."""
    return _encoder.encode(number, documents)


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()  # returns when the parent has ended, killed or not
    os._exit(1)
