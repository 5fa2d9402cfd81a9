"""Corpora that lie behind a URL: what is local of them, and where the rest is read from.

The small files of a corpus and as many of its shards, from the first on, as `data.cache_bytes`
allow are copied to a local folder when they are first read, each once per node and checked by its
hash. Of the other shards the documents that a rank reads are fetched, those of a step in one
request of many ranges (`data/remote_file.py`). Documents come in random order from all shards, so
dropping one shard for another would only copy more. (fsspec's own caches of files have no bound.)
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np

from data.atomic_file import write_aside
from data.config import DataConfig
from data.failure import ReadError, is_lasting
from data.file_lock import take_turn
from data.local_copies import LocalCopies
from data.manifest import FILE, FileRecord, Manifest, ShardRecord, Split, read_manifest
from data.mirror import mirror_folder
from data.remote_file import RemoteFile, RemoteTokens, open_url
from data.retry import RetryConfig, retry
from data.shards import DTYPES, INT32, UINT16

log = logging.getLogger(__name__)

COPIED_AT_ONCE = 2**23  # bytes
LOOKS_AT_ONCE = 64

Tags = dict[str, str]
"""What changes with a file's content, by its name."""


def open_remote(url: str, config: DataConfig) -> "RemoteCorpus":
    """The corpus behind a URL, with the patience and the disk that the config allows."""
    return RemoteCorpus(url, cache_bytes=config.cache_bytes, patience=config.retry)


class RemoteCorpus:
    """The files of a prepared corpus behind a URL."""

    def __init__(self, url: str, *, cache_bytes: int, patience: RetryConfig) -> None:
        self.url = url.rstrip("/")
        self.folder = mirror_folder(url)
        self._most = cache_bytes
        self._copies = LocalCopies(self.folder, url=self.url, most=cache_bytes)
        self._patience = patience
        self._root = open_url(self.url, timeout=patience.timeout_seconds)
        self._checked: set[str] = set()  # files that were looked at
        self._tags: Tags = {}  # that all ranks agreed upon

    def bring(self) -> Manifest:
        """The manifest; it, all small files and the held-out text are local afterwards.

        While the URL can't be reached, the copies of an earlier run serve, which were checked
        when they were made.

        Raises:
            ValueError: There is no corpus, or the local copies are another one's.
            OSError: What has no local copy can't be read, or is not what was prepared.
        """
        manifest = self.bring_manifest()
        self.bring_files(manifest)
        return manifest

    def bring_manifest(self) -> Manifest:
        """The same, but nothing else is copied."""
        self._copies.open()
        self._bring_manifest()
        manifest = read_manifest(self.folder)
        self._refuse_elsewhere(manifest)
        return manifest

    def bring_files(self, manifest: Manifest) -> None:
        """The same, but for the manifest."""
        records = _list_needed(manifest)
        self._copies.refuse_without_room(records)
        for record in records:
            self.bring_file(record)

    def verify_copies(self, manifest: Manifest) -> None:
        """Raises ValueError where a copy that is here is damaged."""
        files = [*_list_needed(manifest), *_files_of(manifest.train.shards)]
        self._copies.refuse_damaged(files)

    def bring_file(self, record: FileRecord) -> Path:
        """The local copy of a file, made if there is none, with patience; see `copy`."""
        return retry(lambda: self.copy(record), self._patience, forget=self.forget)

    def find_kept(self, manifest: Manifest, split: Split) -> list[bool]:
        """Which shards may have a local copy: of the training split the first ones, up to the
        bound; all that are held out."""
        if split is Split.validation:
            return [True] * len(manifest.validation.shards)
        sizes = np.cumsum([shard.bin.num_bytes for shard in manifest.train.shards])
        return (sizes <= self._most).tolist()

    def refuse_without_room(self, manifest: Manifest) -> None:
        """That the copies of all training shards which may have one find room on the disk.

        Raises:
            ReadError: They don't.
        """
        kept = self.find_kept(manifest, Split.train)
        shards = [s for s, is_kept in zip(manifest.train.shards, kept, strict=True) if is_kept]
        self._copies.refuse_without_room(_files_of(shards))

    def copy(self, record: FileRecord) -> Path:
        """The local copy of a file, made if there is none; by one of the processes that want it,
        whose failure is that of all who wait for it.

        Raises:
            OSError: It can't be read, has no room here, or is not the file that was prepared.
            ValueError: The manifest, which anybody may have written, names a place elsewhere.
        """
        if not _lies_in_folder(record.name):
            raise ValueError(
                f"{self.url}'s {FILE} lists {record.name}, which lies outside its folder: nothing "
                "is written there; copy the corpus there again"
            )
        path = self.folder / record.name
        if not self._copies.is_whole(record):
            with self._turn(record.name, record.num_bytes):
                if not self._copies.is_whole(record):
                    self._copies.refuse_without_room([record])
                    self._download(record, path)
        return path

    def open(self, shard: ShardRecord) -> RemoteTokens:
        """The tokens of a shard without a copy.

        Raises:
            OSError: The shard is another one than was prepared, or than when it was first read,
                as far as that can be told.
        """
        if shard.bin.name not in self._checked:
            self._look(shard.bin)
        if shard.bin.num_bytes not in (2 * shard.tokens, 4 * shard.tokens):
            raise ReadError(f"{self.url}'s {FILE} contradicts itself about {shard.bin.name}")
        code = UINT16 if shard.bin.num_bytes == 2 * shard.tokens else INT32
        return RemoteTokens(self._file(shard.bin.name), DTYPES[code])

    def find_tags(self, manifest: Manifest) -> Tags:
        """The tags of the training shards of which ranges are read, where the server gives any.

        Raises:
            OSError: See `open`.
        """
        kept = self.find_kept(manifest, Split.train)
        shards = [s for s, is_kept in zip(manifest.train.shards, kept, strict=True) if not is_kept]

        def look(shard: ShardRecord) -> str | None:
            ask = lambda: self._look(shard.bin)  # noqa: E731
            return retry(ask, self._patience, forget=self.forget)

        with ThreadPoolExecutor(LOOKS_AT_ONCE) as threads:
            found = zip(shards, threads.map(look, shards), strict=True)
            return {shard.bin.name: tag for shard, tag in found if tag is not None}

    def expect(self, tags: Tags) -> None:
        """From now on only shards with these tags are read.

        Raises:
            ReadError: This node has read others.
        """
        self._tags = tags
        for name, tag in tags.items():
            self._refuse_other_tag(name, tag, self._note_tag(name, tag))

    def forget(self) -> None:
        """What the client knows of the files may be stale."""
        self._root.files.invalidate_cache()

    def _file(self, name: str) -> RemoteFile:
        return self._root._replace(path=f"{self._root.path}/{name}")

    @contextmanager
    def _turn(self, name: str, num_bytes: int) -> Iterator[None]:
        """While entered, no other process writes the copy of a file."""
        explained = self._copies.explained
        # Once for the lock itself, once so that those who wait read the explanation.
        with (
            explained(num_bytes),
            take_turn(self.folder / f"{name}.lock"),
            explained(num_bytes),
        ):
            yield

    def _look(self, record: FileRecord) -> str | None:
        """The tag of a file of which ranges are read. They can't be checked by hash, so what is
        known of the whole file must be what it was; it is asked once by each process."""
        remote = self._file(record.name)
        seen = remote.look()
        if seen.num_bytes is not None and seen.num_bytes != record.num_bytes:
            how = "shorter" if seen.num_bytes < record.num_bytes else "longer"
            raise ReadError(
                f"{remote.url} is {how} than the corpus' manifest says: {seen.num_bytes:,} bytes "
                f"instead of {record.num_bytes:,}; copy the corpus there again"
            )
        if seen.tag is not None:
            known = self._tags.get(record.name) or self._note_tag(record.name, seen.tag)
            self._refuse_other_tag(record.name, seen.tag, known)
        self._checked.add(record.name)
        return seen.tag

    def _note_tag(self, name: str, tag: str) -> str:
        """The tag that this node noted first, which is this one if it had none."""
        path = self.folder / f"{name}.etag"
        if not path.is_file():
            try:
                with self._turn(name, len(tag)):
                    if not path.is_file():
                        with write_aside(path, alone=False) as file:
                            file.write(tag.encode())
            except ReadError as error:
                if not is_lasting(error):
                    raise
                return tag  # nothing can be noted on this disk
        return path.read_text()

    def _refuse_other_tag(self, name: str, tag: str, known: str) -> None:
        if tag != known:
            raise ReadError(
                f"{self._file(name).url} was replaced since it was first read (its ETag is {tag}, "
                f"was {known}); put the old one back, or, if it is the same, delete "
                f"{self.folder / name}.etag on every node"
            )

    def _bring_manifest(self) -> None:
        path, remote = self.folder / FILE, self._file(FILE)
        try:
            once = RetryConfig(attempts=1)  # local copies are as good
            content = retry(
                lambda: _read_if_there(remote),
                once if path.is_file() else self._patience,
                forget=self.forget,
            )
        except OSError as error:
            if not path.is_file():
                raise
            log.warning("%s; its local copies in %s are read instead", error, self.folder)
            return
        if content is None and path.is_file():
            log.warning("%s is gone; its local copies in %s are read", remote.url, self.folder)
            return
        if content is None:
            raise ValueError(
                f"{self.url} holds no finished corpus (no {FILE}); corpora are made in local "
                "folders: prepare it in one, and copy all of that to the URL"
            )
        if not path.is_file():
            with self._turn(FILE, len(content)):
                if not path.is_file():
                    with write_aside(path, alone=False) as file:
                        file.write(content)
        if path.read_bytes() != content:
            raise ValueError(
                f"{self.folder} holds copies of another corpus than lies behind {self.url} now; "
                "put that one back, or delete the folder to copy the new one"
            )

    def _refuse_elsewhere(self, manifest: Manifest) -> None:
        """What other tools tokenized is not in the corpus' folder, so it isn't behind the URL."""
        for split in (manifest.train, manifest.validation):
            for shard in split.shards:
                if not _lies_in_folder(shard.name):
                    raise ValueError(
                        f"{self.url} only points to its shards, such as {shard.name}: corpora of "
                        "data=tokenized are read where they were made"
                    )

    def _download(self, record: FileRecord, path: Path) -> None:
        remote = self._file(record.name)
        digest = sha256()
        with remote.open() as source, write_aside(path, alone=False) as file:
            while part := remote.read_part(source, COPIED_AT_ONCE):
                digest.update(part)
                file.write(part)
            if digest.hexdigest() != record.sha256:
                raise ReadError(
                    f"{remote.url} does not match its sha256 in {FILE}; copy the corpus there again"
                )


def _list_needed(manifest: Manifest) -> list[FileRecord]:
    """What is copied in any case: small files and held-out text."""
    records = [manifest.tokenizer.file, manifest.origin]
    for split in (manifest.train, manifest.validation):
        records += filter(None, (split.unigram, split.index, split.prompts))
    return records + _files_of(manifest.validation.shards)


def _files_of(shards: list[ShardRecord]) -> list[FileRecord]:
    return [file for shard in shards for file in (shard.bin, shard.idx)]


def _lies_in_folder(name: str) -> bool:
    return Path(name).name == name != ".."


def _read_if_there(file: RemoteFile) -> bytes | None:
    try:
        return file.read()
    except ReadError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
