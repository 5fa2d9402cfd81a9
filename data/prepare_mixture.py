"""A mixture as a corpus of its own: one tokenizer, and the sources' validation splits in a row.

Nothing is copied but the tokenizer; the manifest points to the sources' shards where they lie.
"""

import logging
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np

from data import origin
from data.atomic_file import write_aside, write_json
from data.blend import SourceConfig
from data.config import MixtureData, find_folder
from data.documents import write_index
from data.file_lock import hold_lock
from data.manifest import (
    FileRecord,
    Manifest,
    ShardRecord,
    Split,
    SplitRecord,
    read_manifest,
    record_file,
    write_manifest,
)
from data.mirror import is_remote
from data.remote import open_remote
from data.unigram import read_unigram

log = logging.getLogger(__name__)


def prepare_mixture(config: MixtureData) -> Manifest:
    """The manifest of the mixture in `data.folder`, written anew where it would differ.

    Raises:
        ValueError: A source is not prepared, or of another tokenizer than the first.
    """
    folder = find_folder(config)
    if any(folder.absolute() == find_folder(source).absolute() for source in config.sources):
        raise ValueError(
            f"data.folder={folder} is also a source's; the mixture needs a folder of its own"
        )
    folders = {source.name: find_folder(source) for source in config.sources}
    manifests = {source.name: _read_source(source, config) for source in config.sources}
    first, *others = manifests
    tokenizer = manifests[first].tokenizer
    for name in others:
        if manifests[name].tokenizer.fingerprint != tokenizer.fingerprint:
            given = folders[first] / tokenizer.file.name
            raise ValueError(
                f"the sources {first} and {name} were made with different tokenizers; prepare "
                f"{name} again with data.tokenizer.path={given}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / "prepare.lock", waits=True):  # of another run that begins now
        with write_aside(folder / tokenizer.file.name) as file:
            file.write((folders[first] / tokenizer.file.name).read_bytes())
        sources = [asdict(source) for source in config.sources]
        write_json(folder / origin.FILE, {"settings": {"kind": config.kind}, "sources": sources})
        manifest = Manifest(
            tokenizer=tokenizer,
            train=_join(config, manifests, Split.train),
            validation=_join(config, manifests, Split.validation),
            empty_documents=sum(manifest.empty_documents for manifest in manifests.values()),
            origin=record_file(folder / origin.FILE),
        )
        write_manifest(folder, manifest)
    log.info("%s: %s", folder, ", ".join(f"{n} {m.train.tokens:,}" for n, m in manifests.items()))
    return manifest


def _read_source(source: SourceConfig, config: MixtureData) -> Manifest:
    try:
        if is_remote(source.folder):
            return open_remote(source.folder, config).bring()
        return read_manifest(find_folder(source))
    except (ValueError, OSError) as error:
        raise ValueError(f"the source {source.name}: {error}") from error


def _join(config: MixtureData, manifests: dict[str, Manifest], split: Split) -> SplitRecord:
    """All sources' splits as one; token frequencies are weighted as the mixture is at its start."""
    folder = find_folder(config)
    records = {name: manifest.split(split) for name, manifest in manifests.items()}
    total = sum(record.tokens for record in records.values())
    counts = np.zeros(manifests[next(iter(manifests))].tokenizer.size, np.int64)
    for source in config.sources:
        own = read_unigram(find_folder(source), split)
        weight = source.weight / sum(other.weight for other in config.sources)
        if split is Split.train:
            own = np.rint(own * (weight * total / own.sum())).astype(np.int64)
        counts += own
    unigram = folder / f"unigram-{split}.npy"
    with write_aside(unigram) as file:
        np.save(file, counts)
    shards = {
        source.name: [_move(shard, find_folder(source)) for shard in records[source.name].shards]
        for source in config.sources
        if split is Split.validation or not is_remote(source.folder)  # those lie elsewhere
    }
    index = prompts = None
    prompt_tokens = sum(record.prompt_tokens for record in records.values())
    if split is Split.validation:  # what is trained on is read from the sources themselves
        index = folder / f"documents-{split}.i64"
        prompts = folder / f"prompts-{split}.i32" if prompt_tokens else None
        prefixes = {
            Path(shard.name): records[name].prompts is not None
            for name, own_shards in shards.items()
            for shard in own_shards
        }
        write_index(prefixes, index, prompts)
    return SplitRecord(
        documents=sum(record.documents for record in records.values()),
        tokens=total,
        prompt_tokens=prompt_tokens,
        text_bytes=sum(record.text_bytes for record in records.values()),
        unigram=record_file(unigram),
        index=None if index is None else record_file(index),
        prompts=None if prompts is None else record_file(prompts),
        shards=list(chain.from_iterable(shards.values())),
    )


def _move(shard: ShardRecord, folder: Path) -> ShardRecord:
    """The record as it reads from anywhere."""

    def move(record: FileRecord) -> FileRecord:
        return replace(record, name=str((folder / record.name).absolute()))

    name = str((folder / shard.name).absolute())
    return replace(shard, name=name, bin=move(shard.bin), idx=move(shard.idx))
