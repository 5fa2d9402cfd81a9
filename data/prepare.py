"""From documents to a prepared corpus: tokenizer, token shards, manifest.

    folder/tokenizer.model (.json)     trained, or a copy of the given one
    folder/origin.json                 settings and input files: from here on a run can continue
    folder/train-00000.bin .idx        shards of tokens; validation-00000 likewise
    folder/finished_shards/00000.json  record of a finished shard, until all are finished; what was
                                       found out to select documents lies here too
    folder/unigram-train.npy           how often each token occurs; validation likewise
    folder/documents-train.i64         where each document begins; validation likewise
    folder/prompts-train.i32           how long its prompt is, if there are prompts
    folder/report.json                 documents in, kept and dropped, and why; bytes per token
    folder/manifest.json               written last

Nothing depends on time or on the number of processes: two runs write the same bytes. A run that
was killed goes on after the shards that it finished.
"""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import origin
from data.atomic_file import write_aside
from data.config import (
    DataConfig,
    MixtureData,
    TokenizedData,
    Verify,
    check_data,
    count_workers,
    find_folder,
)
from data.corpus import read_documents
from data.document import Document
from data.documents import write_index
from data.encode_shard import (
    EMPTY,
    RECORDS,
    EncodedShard,
    ShardEncoder,
    clear_records,
    split_of,
)
from data.file_lock import hold_lock
from data.manifest import (
    FILE,
    Manifest,
    ShardRecord,
    Split,
    SplitRecord,
    read_manifest,
    record_file,
    record_tokenizer,
    verify_corpus,
    write_manifest,
)
from data.mirror import is_remote
from data.prepare_tokenized import prepare_tokenized
from data.prepared_corpus import bring_here, find_tokenizer, open_corpora
from data.progress import Advance, Progress, open_progress
from data.remote import open_remote
from data.report import make_report, write_report
from data.select_corpus import Selection, select_documents
from data.shard_pool import cut_shards, work_on_shards
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

    Progress goes to stderr unless told otherwise. A corpus behind a URL is only looked up. Not for
    mixtures: each of their sources is prepared by itself.

    Raises:
        ValueError: Settings, input or what lies in the folder is at fault; says which and what
            to do.
        RuntimeError: A worker process died, or the disk is full; running again continues.
        OSError: A URL can't be reached.
    """
    check_data(config)
    assert not isinstance(config, MixtureData), "its sources are prepared"
    folder = find_folder(config)
    if is_remote(config.folder):  # there nothing is made, so nothing is compared with the config
        return Prepared(folder, open_remote(config.folder, config).bring(), was_ready=True)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FILE).is_file():  # a finished corpus is anyone's to read, at any time
        return _accept_finished(config, folder)
    with _lock(folder):
        if (folder / FILE).is_file():  # by now
            return _accept_finished(config, folder)
        if isinstance(config, TokenizedData):
            tokenized = prepare_tokenized(
                config, folder=folder, tokenizer_path=tokenizer_path(config)
            )
            return Prepared(folder, tokenized, was_ready=False)
        _begin_or_continue(config, folder)
        with _explain_failure(folder):
            manifest = _make(config, folder, progress or open_progress())
        return Prepared(folder, manifest, was_ready=False)


def make_ready(config: DataConfig) -> None:
    """What a run of `config` reads is there afterwards: its corpus, or the sources of its mixture,
    which must be prepared already.

    Raises:
        ValueError: See `prepare` and `open_corpora`.
        RuntimeError: See `prepare`.
        OSError: A URL can't be reached.
    """
    if not isinstance(config, MixtureData):
        prepare(config)
        return
    check_data(config)
    corpora = open_corpora(config)
    bring_here(corpora)
    for corpus in corpora:
        log.info("source %s: %s tokens", corpus.name, f"{corpus.manifest.train.tokens:,}")


def tokenizer_path(config: DataConfig) -> Path:
    """The tokenizer's file of a run's corpora, copied here if it lies behind a URL."""
    if isinstance(config, MixtureData) or is_remote(config.folder):
        return find_tokenizer(config)
    given = config.tokenizer.path
    return find_folder(config) / f"tokenizer{'.model' if given is None else Path(given).suffix}"


def _accept_finished(config: DataConfig, folder: Path) -> Prepared:
    manifest = read_manifest(folder)
    now = origin.describe_origin(config, verify=config.verify)
    origin.refuse_change(folder, kept=origin.read_origin(folder), now=now)
    verify_corpus(folder, manifest, verify=Verify.fast)
    if (folder / RECORDS).is_dir():  # of a run that was killed after it had written the manifest
        with suppress(ValueError, OSError), _lock(folder):  # or that is at it, or not ours to touch
            clear_records(folder)
    tokens = manifest.train.tokens + manifest.validation.tokens
    log.info("%s is prepared already (%d tokens), nothing to do", folder, tokens)
    return Prepared(folder, manifest, was_ready=True)


def _begin_or_continue(config: DataConfig, folder: Path) -> None:
    """Leaves the origin in the folder, and nothing that belongs to another one."""
    now = origin.describe_origin(config, verify=Verify.full)
    if (folder / origin.FILE).is_file():
        origin.refuse_change(folder, kept=origin.read_origin(folder), now=now)
        log.info("continuing the unfinished corpus in %s", folder)
        return
    clear_records(folder)
    if config.tokenizer.path is None:
        tokenizer_path(config).unlink(missing_ok=True)
    origin.write_origin(folder, now)


def _make(config: DataConfig, folder: Path, progress: Progress) -> Manifest:
    """The stages in order; each leaves what it has finished in the folder."""
    (folder / RECORDS).mkdir(exist_ok=True)
    selection: Selection | None = None
    total_bytes: int | None = None
    if config.select.is_asked_for:
        with progress.stage("select", total_bytes=None) as advance:
            selection = select_documents(config, folder=folder, advance=advance)

    def read() -> Iterator[Document]:
        documents = read_documents(config)
        return documents if selection is None else selection.mark(documents)

    if config.tokenizer.path is not None or not tokenizer_path(config).is_file():
        with progress.stage("tokenizer", total_bytes=None) as advance:
            total_bytes = _make_tokenizer(config, read, advance)
    load_tokenizer(tokenizer_path(config))  # refused here if it is of no use
    with progress.stage("tokenize", total_bytes=total_bytes) as advance:
        shards = work_on_shards(
            cut_shards(read(), config.shard_bytes),
            partial(ShardEncoder, folder, tokenizer_path(config), config.validation_fraction),
            num_workers=count_workers(config),
            advance=advance,
        )
    if selection is not None:
        selection.refuse_other_text([shard.text_sha256 for shard in shards])
    return _finish(config, folder, shards)


def _make_tokenizer(
    config: DataConfig, read: Callable[[], Iterator[Document]], advance: Advance
) -> int | None:
    """Copies the tokenizer that was given, or trains one on the training split alone.

    Returns the UTF-8 size of the whole corpus, if all of it was read.
    """
    if config.tokenizer.path is not None:
        with write_aside(tokenizer_path(config)) as file:
            file.write(Path(config.tokenizer.path).expanduser().read_bytes())
        return None
    total_bytes = 0

    def training_texts() -> Iterator[str]:
        nonlocal total_bytes
        for document in read():
            total_bytes += document.num_bytes
            advance(document.num_bytes)
            is_train = split_of(document, config.validation_fraction) is Split.train
            if document.text and document.left_out is None and is_train:
                yield document.whole.decode()

    passages = sample_passages(training_texts(), max_bytes=config.tokenizer.train_bytes)
    if not passages:
        raise ValueError(_explain_empty(config, Split.train, total_bytes))
    train_tokenizer(passages, config.tokenizer, tokenizer_path(config))
    return total_bytes


def _finish(config: DataConfig, folder: Path, shards: list[EncodedShard]) -> Manifest:
    tokenizer = record_tokenizer(tokenizer_path(config))
    splits = {
        Split.train: [shard.train for shard in shards if shard.train],
        Split.validation: [shard.validation for shard in shards if shard.validation],
    }
    total_bytes = sum(shard.text_bytes for split in splits.values() for shard in split)
    for split, records in splits.items():
        if not records:
            raise ValueError(_explain_empty(config, split, total_bytes))
    manifest = Manifest(
        tokenizer=tokenizer,
        train=_finish_split(folder, Split.train, splits[Split.train], tokenizer.size),
        validation=_finish_split(
            folder, Split.validation, splits[Split.validation], tokenizer.size
        ),
        empty_documents=sum(shard.left_out.get(EMPTY, 0) for shard in shards),
        origin=record_file(folder / origin.FILE),
    )
    write_report(folder, make_report(manifest, shards, config.select))
    write_manifest(folder, manifest)
    clear_records(folder)
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
    if config.select.is_asked_for:
        hint = f"data.select and data.validation_fraction={config.validation_fraction} leave no"
        return f"{hint} document for {split}; choose others, or more documents"
    if total_bytes == 0:
        return f"the corpus data={config.kind} is empty: no document holds text; choose another"
    return (
        f"data.validation_fraction={config.validation_fraction} leaves no document for "
        f"{split} among {total_bytes} bytes of text; choose another fraction or more documents"
    )


@contextmanager
def _explain_failure(folder: Path) -> Iterator[None]:
    """After a mistake of the user's the next run begins anew; after trouble with the machine it
    continues."""
    try:
        yield
    except ValueError:
        (folder / origin.FILE).unlink(missing_ok=True)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(
            f"the disk of data.folder={folder} is full ({error}); finished shards are kept: make "
            "room and run prepare again, which continues"
        ) from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps a second `prepare` out while a corpus is made."""
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(folder / "prepare.lock", waits=False))
        except BlockingIOError as error:
            raise ValueError(
                f"data.folder={folder} is being prepared by another process; "
                "wait for it, or choose another data.folder"
            ) from error
        yield
