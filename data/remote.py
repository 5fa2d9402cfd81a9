"""Sources that lie behind a URL: what is local of them, and reading the rest from afar.

Any file system that fsspec knows. The small files of a corpus and as many of its shards, from the
first on, as `data.cache_bytes` allow are copied to a local folder when they are first read, each
checked by its hash. Of the other shards the documents that a rank reads are fetched, those of
a step in one request of many ranges. Documents come in random order from all shards, so dropping
one shard for another would only copy more. (fsspec's own caches of files have no bound.)
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt

from data.atomic_file import PARTIAL, write_aside
from data.manifest import FILE, FileRecord, Manifest, ShardRecord, read_manifest
from data.mirror import mirror_folder
from data.shards import DTYPES, INT32, UINT16

COPIED_AT_ONCE = 2**24  # bytes
LEFT_SECONDS = 3600  # since a copy was last written to, after which nobody is making it


class RemoteCorpus:
    """The files of a prepared corpus behind a URL.

    Raises:
        OSError: They can't be read, or a copied file is not the one that was prepared.
    """

    def __init__(self, url: str, *, cache_bytes: int) -> None:
        self.url = url.rstrip("/")
        self.folder = mirror_folder(url)
        self._most = cache_bytes
        self._files, self._root = fsspec.url_to_fs(self.url)

    def read_manifest(self) -> Manifest:
        """The manifest; it and all small files are local afterwards.

        Raises:
            ValueError: The local copies are another corpus'.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        path = self.folder / FILE
        with _as_os_error():
            content = self._files.cat_file(f"{self._root}/{FILE}")
        if not path.is_file():
            with write_aside(path, alone=False) as file:
                file.write(content)
        elif path.read_bytes() != content:
            raise ValueError(
                f"{self.folder} holds copies of another corpus than lies behind {self.url} now; "
                "put that one back, or delete the folder to copy the new one"
            )
        manifest = read_manifest(self.folder)
        for split in (manifest.train, manifest.validation):
            for record in (split.unigram, split.index, split.prompts):
                if record is not None:
                    self.copy(record)
        for record in (manifest.tokenizer.file, manifest.origin):
            self.copy(record)
        for shard in manifest.validation.shards:
            self.copy(shard.bin)
            self.copy(shard.idx)
        return manifest

    def find_kept(self, manifest: Manifest) -> list[bool]:
        """Which training shards may have a local copy: the first ones, up to the bound."""
        sizes = np.cumsum([shard.bin.num_bytes for shard in manifest.train.shards])
        return (sizes <= self._most).tolist()

    def copy(self, record: FileRecord) -> Path:
        """The local copy of a file, made if there is none."""
        path = self.folder / record.name
        if path.is_file() and path.stat().st_size == record.num_bytes:
            return path
        digest = sha256()
        with (
            _as_os_error(),
            self._files.open(f"{self._root}/{record.name}", "rb") as source,
            write_aside(path, alone=False) as file,
        ):
            while part := source.read(COPIED_AT_ONCE):
                digest.update(part)
                file.write(part)
            if digest.hexdigest() != record.sha256:
                raise OSError(
                    f"{self.url}/{record.name} does not match its sha256 in {FILE}; copy the "
                    "corpus there again"
                )
        return path

    def _remove_leftovers(self) -> None:
        """Remove what processes were copying when they were killed."""
        for path in self.folder.glob(f"*{PARTIAL}"):
            with suppress(FileNotFoundError):  # another rank may remove it too
                if time.time() - path.stat().st_mtime > LEFT_SECONDS:
                    path.unlink()

    def open(self, shard: ShardRecord) -> "RemoteTokens":
        """The tokens of a shard without a copy."""
        assert shard.bin.num_bytes == 2 * shard.tokens or shard.bin.num_bytes == 4 * shard.tokens
        code = UINT16 if shard.bin.num_bytes == 2 * shard.tokens else INT32
        return RemoteTokens(self._files, f"{self._root}/{shard.bin.name}", DTYPES[code])


class RemoteTokens:
    """Slices of a remote file of tokens; those that were announced come from one request."""

    def __init__(self, files: Any, path: str, dtype: np.dtype[Any]) -> None:
        self.files, self.path, self.dtype = files, path, dtype
        self._fetched: dict[tuple[int, int], bytes] = {}

    def __getitem__(self, where: slice) -> npt.NDArray[np.integer[Any]]:
        size = self.dtype.itemsize
        span = where.start * size, where.stop * size
        content = self._fetched.get(span)
        if content is None:
            with _as_os_error():
                content = self.files.cat_file(self.path, *span)
        if len(content) != span[1] - span[0]:
            raise OSError(f"{self.path} is shorter than the corpus' manifest says")
        return np.frombuffer(content, self.dtype)

    def keep(self, spans: dict[tuple[int, int], bytes]) -> None:
        """What the next slices are taken from."""
        self._fetched = spans


def fetch(wanted: Iterable[tuple[RemoteTokens, int, int]]) -> None:
    """Bring ranges [start, stop) of tokens here, those of one file system in one request.

    Raises:
        OSError: They can't be read.
    """
    by_system: dict[int, list[tuple[RemoteTokens, int, int]]] = {}
    for tokens, start, stop in wanted:
        size = tokens.dtype.itemsize
        by_system.setdefault(id(tokens.files), []).append((tokens, start * size, stop * size))
    for ranges in by_system.values():
        files = ranges[0][0].files
        with _as_os_error():
            contents = files.cat_ranges(
                [tokens.path for tokens, _, _ in ranges],
                [start for _, start, _ in ranges],
                [stop for _, _, stop in ranges],
                on_error="raise",
            )
            for content in contents:
                if isinstance(content, Exception):  # fsspec 2024.2 returns those of HTTP and S3
                    raise content
        by_file: dict[int, dict[tuple[int, int], bytes]] = {}
        for (tokens, *span), content in zip(ranges, contents, strict=True):
            by_file.setdefault(id(tokens), {})[span[0], span[1]] = content
        for tokens in {id(tokens): tokens for tokens, _, _ in ranges}.values():
            tokens.keep(by_file[id(tokens)])


@contextmanager
def _as_os_error() -> Iterator[None]:
    """File systems raise what their clients do (aiohttp's errors are no OSErrors); the run saves
    and stops at an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error) or repr(error)) from error
