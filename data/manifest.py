"""The manifest of a prepared corpus: its tokenizer, shards and totals, each with its hash.

`manifest.json` is written last: a folder with a manifest is complete. It ends with the sha256 of
its own content.
"""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any

from data.atomic_file import hash_file, read_json, write_json
from data.config import Verify
from data.tokenizer import FimIds, load_tokenizer

FILE = "manifest.json"
VERSION = 2


class Split(StrEnum):
    """The two parts of a corpus; a document is in exactly one."""

    train = "train"
    validation = "validation"


@dataclass(slots=True, frozen=True)
class FileRecord:
    """A file of the corpus folder as it was when it was finished."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(slots=True, frozen=True)
class ShardRecord:
    """One shard; `text_bytes` is the UTF-8 size of its documents before tokenization.

    Prompts are left out of `text_bytes`: it is the text that a model is judged by. `loss` says
    which tokens count as prompts where these are not all at the beginning of documents.
    """

    name: str
    documents: int
    tokens: int
    prompt_tokens: int
    text_bytes: int
    bin: FileRecord
    idx: FileRecord
    loss: FileRecord | None = None  # see data/loss_masks.py

    @property
    def files(self) -> list[FileRecord]:
        """All that it consists of."""
        return [self.bin, self.idx, *([self.loss] if self.loss is not None else [])]


@dataclass(slots=True, frozen=True)
class TokenizerRecord:
    """What a reader of the corpus needs to know of its tokenizer without loading it."""

    file: FileRecord
    size: int
    bos_id: int
    eos_id: int
    pad_id: int
    fim: FimIds | None

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's file."""
        return self.file.sha256


@dataclass(slots=True, frozen=True)
class SplitRecord:
    """One split: its shards in order, their sums, how often each token id occurs, and the index
    of its documents (see `data/documents.py`)."""

    documents: int
    tokens: int
    prompt_tokens: int
    text_bytes: int
    unigram: FileRecord
    index: FileRecord
    prompts: FileRecord | None
    shards: list[ShardRecord]

    def count_predicted(self, *, are_documents_masked: bool) -> int:
        """Tokens that are a target: no prompt's, and no document's first where documents can't
        see each other. That first token belongs to the prompt where there are prompts."""
        hidden = (max(shard.prompt_tokens, shard.documents) for shard in self.shards)
        seen = 0 if are_documents_masked else sum(shard.documents for shard in self.shards)
        return self.tokens - sum(hidden) + seen

    @property
    def fingerprint(self) -> str:
        """sha256 over the hashes of everything that decides what is read."""
        hashes = [self.index.sha256, *(shard.bin.sha256 for shard in self.shards)]
        hashes += [shard.loss.sha256 for shard in self.shards if shard.loss is not None]
        return sha256(" ".join(hashes).encode()).hexdigest()


@dataclass(slots=True, frozen=True)
class Manifest:
    """All that is known of a prepared corpus."""

    tokenizer: TokenizerRecord
    train: SplitRecord
    validation: SplitRecord
    empty_documents: int
    origin: FileRecord

    def split(self, split: Split) -> SplitRecord:
        """The record of one split."""
        return self.train if split is Split.train else self.validation


def record_tokenizer(path: Path) -> TokenizerRecord:
    """The record of a tokenizer's file in the corpus' folder."""
    tokenizer = load_tokenizer(path)
    return TokenizerRecord(
        file=record_file(path),
        size=tokenizer.size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        fim=tokenizer.fim,
    )


def record_file(path: Path) -> FileRecord:
    """The record of a finished file."""
    return FileRecord(path.name, path.stat().st_size, hash_file(path))


def read_shard_record(content: dict[str, Any]) -> ShardRecord:
    """The record in its JSON form."""
    kinds = [kind for kind in ("bin", "idx", "loss") if content.get(kind) is not None]
    files = {kind: FileRecord(**content[kind]) for kind in kinds}
    return ShardRecord(**content | files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Declares the corpus in `folder` complete."""
    content = {"version": VERSION, **asdict(manifest)}
    write_json(folder / FILE, {**content, "sha256": _hash(content)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the corpus in `folder`.

    Raises:
        ValueError: No finished corpus there, another version, or a corrupted manifest.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"data.folder={folder} holds no finished corpus (no {FILE}); "
            "run prepare with the same data settings first"
        )
    content = read_json(path)
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')}, this program reads {VERSION}; "
            "prepare the corpus again in another data.folder"
        )
    if content.pop("sha256", None) != _hash(content):
        raise ValueError(
            f"{path} is corrupted: its content does not match its sha256; "
            "restore it, or delete the folder and prepare again"
        )
    if content["train"]["index"] is None:
        raise ValueError(
            f"{path} describes a mixture, of which earlier versions kept a folder; name its "
            "sources instead: data=mixture data.sources=[...]"
        )
    tokenizer = content["tokenizer"]
    tokenizer["file"] = FileRecord(**tokenizer["file"])
    tokenizer["fim"] = FimIds(*tokenizer["fim"]) if tokenizer["fim"] is not None else None
    return Manifest(
        tokenizer=TokenizerRecord(**tokenizer),
        train=_read_split(content["train"]),
        validation=_read_split(content["validation"]),
        empty_documents=content["empty_documents"],
        origin=FileRecord(**content["origin"]),
    )


def verify_corpus(folder: Path, manifest: Manifest, *, verify: Verify) -> None:
    """Compares the folder's files with the manifest: sizes, and with `full` also hashes.

    Raises:
        ValueError: A file is missing, cut short or corrupted; it is named.
    """
    splits = (manifest.train, manifest.validation)
    shards = [shard for split in splits for shard in split.shards]
    files = [manifest.tokenizer.file]
    for split in splits:
        files += filter(None, (split.unigram, split.index, split.prompts))
    for record in [*files, *(file for shard in shards for file in shard.files)]:
        fault = _find_fault(folder / record.name, record, verify)
        if fault is not None:
            raise ValueError(
                f"{folder / record.name} {fault}; "
                "restore the file, or delete the folder and prepare again"
            )


def _find_fault(path: Path, record: FileRecord, verify: Verify) -> str | None:
    if not path.is_file():
        return f"is missing, {FILE} lists it"
    size = path.stat().st_size
    if size != record.num_bytes:
        return f"has {size} bytes, {FILE} says {record.num_bytes}: it is not the file prepared"
    if verify is Verify.full and hash_file(path) != record.sha256:
        return f"does not match its sha256 in {FILE}: it is corrupted or of another corpus"
    return None


def _read_split(content: dict[str, Any]) -> SplitRecord:
    shards = [read_shard_record(shard) for shard in content["shards"]]
    files = {
        name: FileRecord(**content[name]) if content[name] is not None else None
        for name in ("unigram", "index", "prompts")
    }
    return SplitRecord(**content | files | {"shards": shards})


def _hash(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
