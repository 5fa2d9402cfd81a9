"""From documents to a prepared corpus: tokenizer, token shards, manifest.

    folder/tokenizer.model (.json)     trained, or a copy of the given one
    folder/origin.json                 settings and input files: from here on a run can continue
    folder/train-00000.bin .idx        shards of tokens; validation-00000 likewise
    folder/finished_shards/00000.json  record of a finished shard, until all are finished
    folder/unigram-train.npy           how often each token occurs; validation likewise
    folder/documents-train.i64         where each document begins; validation likewise
    folder/prompts-train.i32           how long its prompt is, if there are prompts
    folder/manifest.json               written last

Nothing depends on time or on the number of processes: two runs write the same bytes. A run that
was killed goes on after the shards that it finished.
"""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import origin
from data.atomic_file import write_aside
from data.config import DataConfig, MixtureData, Verify, check_data, find_folder
from data.corpus import read_documents
from data.documents import write_index
from data.encode_corpus import encode_corpus
from data.encode_shard import EncodedShard, clear_records, split_of
from data.manifest import (
    FILE,
    Manifest,
    ShardRecord,
    Split,
    SplitRecord,
    TokenizerRecord,
    read_manifest,
    record_file,
    verify_corpus,
    write_manifest,
)
from data.prepare_mixture import prepare_mixture
from data.progress import Advance, Progress, open_progress
from data.tokenizer import load_tokenizer
from data.train_tokenizer import sample_passages, train_tokenizer
from data.unigram import count_tokens

log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A prepared corpus; `was_ready` says that there was nothing left to do."""

    folder: Path
    manifest: Manifest
    was_ready: bool


def prepare(config: DataConfig, *, progress: Progress | None = None) -> Prepared:
    """The corpus of `config`, prepared in `data.folder` unless it already is.

    Progress goes to stderr unless told otherwise.

    Raises:
        ValueError: Settings, input or what lies in the folder is at fault; says which and what
            to do.
        RuntimeError: A worker process died; running again continues.
    """
    check_data(config)
    folder = find_folder(config)
    if isinstance(config, MixtureData):
        return Prepared(folder, prepare_mixture(config), was_ready=False)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if (folder / FILE).is_file():
            return _accept_finished(config, folder)
        progress = progress or open_progress()
        total_bytes = _begin_or_continue(config, folder, progress)
        with progress.stage("tokenize", total_bytes=total_bytes) as advance:
            shards = encode_corpus(
                config, folder=folder, tokenizer_path=tokenizer_path(config), advance=advance
            )
        manifest = _finish(config, folder, shards)
        return Prepared(folder, manifest, was_ready=False)


def tokenizer_path(config: DataConfig) -> Path:
    """The corpus' own tokenizer file."""
    if isinstance(config, MixtureData):
        source = find_folder(config.sources[0])
        return find_folder(config) / read_manifest(source).tokenizer.file.name
    given = config.tokenizer.path
    return find_folder(config) / f"tokenizer{'.model' if given is None else Path(given).suffix}"


def _accept_finished(config: DataConfig, folder: Path) -> Prepared:
    manifest = read_manifest(folder)
    now = origin.describe_origin(config, verify=config.verify)
    origin.refuse_change(folder, kept=origin.read_origin(folder), now=now)
    verify_corpus(folder, manifest, verify=Verify.fast)
    clear_records(folder)  # of a run that was killed after it had written the manifest
    tokens = manifest.train.tokens + manifest.validation.tokens
    log.info("%s is prepared already (%d tokens), nothing to do", folder, tokens)
    return Prepared(folder, manifest, was_ready=True)


def _begin_or_continue(config: DataConfig, folder: Path, progress: Progress) -> int | None:
    """Leaves tokenizer and origin in the folder; returns the corpus' bytes where they are known."""
    now = origin.describe_origin(config, verify=Verify.full)
    if (folder / origin.FILE).is_file():
        origin.refuse_change(folder, kept=origin.read_origin(folder), now=now)
        log.info("continuing the unfinished corpus in %s", folder)
        return None
    clear_records(folder)
    total_bytes = None
    if config.tokenizer.path is not None:
        with write_aside(tokenizer_path(config)) as file:
            file.write(Path(config.tokenizer.path).expanduser().read_bytes())
    else:
        with progress.stage("train tokenizer", total_bytes=None) as advance:
            total_bytes = _train_tokenizer(config, tokenizer_path(config), advance)
    load_tokenizer(tokenizer_path(config))  # refused here if it is of no use
    origin.write_origin(folder, now)
    return total_bytes


def _train_tokenizer(config: DataConfig, path: Path, advance: Advance) -> int:
    """Trains on the training split alone; returns the UTF-8 size of the whole corpus."""
    total_bytes = 0

    def training_texts() -> Iterator[str]:
        nonlocal total_bytes
        for document in read_documents(config):
            total_bytes += document.num_bytes
            advance(document.num_bytes)
            is_train = split_of(document, config.validation_fraction) is Split.train
            if document.text and is_train:
                yield ((document.prompt or b"") + document.text).decode()

    passages = sample_passages(training_texts(), max_bytes=config.tokenizer.train_bytes)
    if not passages:
        raise ValueError(_explain_empty(config, Split.train, total_bytes))
    train_tokenizer(passages, config.tokenizer, path)
    return total_bytes


def _finish(config: DataConfig, folder: Path, shards: list[EncodedShard]) -> Manifest:
    tokenizer = load_tokenizer(tokenizer_path(config))
    splits = {
        Split.train: [shard.train for shard in shards if shard.train],
        Split.validation: [shard.validation for shard in shards if shard.validation],
    }
    total_bytes = sum(shard.text_bytes for split in splits.values() for shard in split)
    for split, records in splits.items():
        if not records:
            (folder / origin.FILE).unlink()  # nothing here is worth continuing
            raise ValueError(_explain_empty(config, split, total_bytes))
    empty_documents = sum(shard.empty_documents for shard in shards)
    manifest = Manifest(
        tokenizer=TokenizerRecord(
            file=record_file(tokenizer_path(config)),
            size=tokenizer.size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            fim=tokenizer.fim,
        ),
        train=_finish_split(folder, Split.train, splits[Split.train], tokenizer.size),
        validation=_finish_split(
            folder, Split.validation, splits[Split.validation], tokenizer.size
        ),
        empty_documents=empty_documents,
        origin=record_file(folder / origin.FILE),
    )
    write_manifest(folder, manifest)
    clear_records(folder)
    if empty_documents:
        log.info("left out %d empty documents", empty_documents)
    return manifest


def _finish_split(
    folder: Path, split: Split, shards: list[ShardRecord], vocab_size: int
) -> SplitRecord:
    prefixes = [folder / shard.name for shard in shards]
    unigram = folder / f"unigram-{split}.npy"
    with write_aside(unigram) as file:
        np.save(file, count_tokens(prefixes, vocab_size=vocab_size))
    index, prompts = folder / f"documents-{split}.i64", folder / f"prompts-{split}.i32"
    prompt_tokens = sum(shard.prompt_tokens for shard in shards)
    write_index(dict.fromkeys(prefixes, True), index, prompts if prompt_tokens else None)
    return SplitRecord(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        prompt_tokens=prompt_tokens,
        text_bytes=sum(shard.text_bytes for shard in shards),
        unigram=record_file(unigram),
        index=record_file(index),
        prompts=record_file(prompts) if prompt_tokens else None,
        shards=shards,
    )


def _explain_empty(config: DataConfig, split: Split, total_bytes: int) -> str:
    if total_bytes == 0:
        return f"the corpus data={config.kind} is empty: no document holds text; choose another"
    return (
        f"data.validation_fraction={config.validation_fraction} leaves no document for "
        f"{split} among {total_bytes} bytes of text; choose another fraction or more documents"
    )


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps a second `prepare` out; the system lifts the lock when this process ends."""
    with open(folder / "prepare.lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"data.folder={folder} is being prepared by another process; "
                "wait for it, or choose another data.folder"
            ) from error
        yield
