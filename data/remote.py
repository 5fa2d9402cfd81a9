"""Corpora that lie behind a URL: what is local of them, and where the rest is read from.

The small files of a corpus and as many of its shards, from the first on, as `data.cache_bytes`
allow are copied to a local folder when they are first read, each once per node and checked by its
hash. Of the other shards the documents that a rank reads are fetched, those of a step in one
request of many ranges (`data/remote_file.py`). Documents come in random order from all shards, so
dropping one shard for another would only copy more. (fsspec's own caches of files have no bound.)
"""

import logging
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np

from data.atomic_file import PARTIAL, write_aside
from data.config import DataConfig, list_sources
from data.file_lock import hold_lock
from data.manifest import FILE, FileRecord, Manifest, ShardRecord, Split, read_manifest
from data.mirror import is_remote, mirror_folder
from data.remote_file import RemoteFile, RemoteTokens, open_url
from data.retry import RetryConfig, retry
from data.shards import DTYPES, INT32, UINT16

log = logging.getLogger(__name__)

COPIED_AT_ONCE = 2**24  # bytes
LEFT_SECONDS = 3600  # since a copy was last written to, after which nobody is making it


def bring_here(config: DataConfig) -> None:
    """Local copies of the small files and the held-out text of all that lies behind a URL.

    Raises:
        ValueError: See `RemoteCorpus.bring`.
        OSError: Likewise.
    """
    for source in list_sources(config):
        if is_remote(source.folder):
            open_remote(source.folder, config).bring()


def open_remote(url: str, config: DataConfig) -> "RemoteCorpus":
    """The corpus behind a URL, with the patience and the disk that the config allows."""
    return RemoteCorpus(url, cache_bytes=config.cache_bytes, patience=config.retry)


class RemoteCorpus:
    """The files of a prepared corpus behind a URL."""

    def __init__(self, url: str, *, cache_bytes: int, patience: RetryConfig) -> None:
        self.url = url.rstrip("/")
        self.folder = mirror_folder(url)
        self._most = cache_bytes
        self._patience = patience
        self._root = open_url(self.url, timeout=patience.timeout_seconds)
        self._checked: set[str] = set()  # files whose tag was compared

    def bring(self) -> Manifest:
        """The manifest; it, all small files and the held-out text are local afterwards.

        While the URL can't be reached, the copies of an earlier run serve, which were checked
        when they were made.

        Raises:
            ValueError: There is no corpus, or the local copies are another one's.
            OSError: What has no local copy can't be read, or is not what was prepared.
        """
        manifest = self.bring_manifest()
        records = [manifest.tokenizer.file, manifest.origin]
        for split in (manifest.train, manifest.validation):
            records += filter(None, (split.unigram, split.index, split.prompts))
        records += [file for shard in manifest.validation.shards for file in (shard.bin, shard.idx)]
        for record in records:
            self.bring_file(record)
        return manifest

    def bring_manifest(self) -> Manifest:
        """The same, but nothing else is copied."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._bring_manifest()
        manifest = read_manifest(self.folder)
        self._refuse_elsewhere(manifest)
        return manifest

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

    def copy(self, record: FileRecord) -> Path:
        """The local copy of a file, made if there is none; by one of the processes that want it.

        Raises:
            OSError: It can't be read, or is not the file that was prepared.
            ValueError: The manifest, which anybody may have written, names a place elsewhere.
        """
        if not _lies_in_folder(record.name):
            raise ValueError(
                f"{self.url}'s {FILE} lists {record.name}, which lies outside its folder: nothing "
                "is written there; copy the corpus there again"
            )
        path = self.folder / record.name
        if not _is_whole(path, record):
            with hold_lock(path.with_name(f"{path.name}.lock"), waits=True):
                if not _is_whole(path, record):
                    self._download(record, path)
        return path

    def open(self, shard: ShardRecord) -> RemoteTokens:
        """The tokens of a shard without a copy.

        Raises:
            OSError: The shard is another one than when it was first read.
        """
        self._check_tag(shard.bin)
        if shard.bin.num_bytes not in (2 * shard.tokens, 4 * shard.tokens):
            raise OSError(f"{self.url}'s {FILE} contradicts itself about {shard.bin.name}")
        code = UINT16 if shard.bin.num_bytes == 2 * shard.tokens else INT32
        return RemoteTokens(self._file(shard.bin.name), DTYPES[code])

    def forget(self) -> None:
        """What the client knows of the files may be stale."""
        self._root.files.invalidate_cache()

    def _file(self, name: str) -> RemoteFile:
        return self._root._replace(path=f"{self._root.path}/{name}")

    def _check_tag(self, record: FileRecord) -> None:
        """Ranges can't be checked by hash, so what is known of the whole file must stay the same;
        it is asked once by each process."""
        if record.name in self._checked:
            return
        remote, path = self._file(record.name), self.folder / f"{record.name}.etag"
        tag = remote.find_tag()
        if tag is not None:
            with hold_lock(path.with_name(f"{record.name}.lock"), waits=True):
                if not path.is_file():
                    with write_aside(path, alone=False) as file:
                        file.write(tag.encode())
            if path.read_text() != tag:
                raise OSError(
                    f"{remote.url} was replaced since it was first read (its ETag is {tag}, was "
                    f"{path.read_text()}); put the old one back, or, if it is the same, delete "
                    f"{path}"
                )
        self._checked.add(record.name)

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
        with hold_lock(self.folder / f"{FILE}.lock", waits=True):
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
        source = remote.ask(lambda: remote.files.open(remote.path, "rb"))
        with source, write_aside(path, alone=False) as file:
            while part := remote.ask(lambda: source.read(COPIED_AT_ONCE)):
                digest.update(part)
                file.write(part)
            if digest.hexdigest() != record.sha256:
                raise OSError(
                    f"{remote.url} does not match its sha256 in {FILE}; copy the corpus there again"
                )

    def _remove_leftovers(self) -> None:
        """Remove what processes were copying when they were killed."""
        for path in self.folder.glob(f"*{PARTIAL}"):
            with suppress(FileNotFoundError):  # another rank may remove it too
                if time.time() - path.stat().st_mtime > LEFT_SECONDS:
                    path.unlink()


def _lies_in_folder(name: str) -> bool:
    return Path(name).name == name != ".."


def _is_whole(path: Path, record: FileRecord) -> bool:
    """Whether the copy is there; it was checked by its hash before it got its name."""
    return path.is_file() and path.stat().st_size == record.num_bytes


def _read_if_there(file: RemoteFile) -> bytes | None:
    try:
        return file.read()
    except FileNotFoundError:
        return None
