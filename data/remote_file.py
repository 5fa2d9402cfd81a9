"""Requests to a file system behind a URL (any that fsspec knows), whose failures are OSErrors.

File systems raise what their clients do (aiohttp's errors are no OSErrors) and wait as long as
these like; a run saves and stops at an OSError.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt

from data.retry import within

T = TypeVar("T")


class RemoteFile(NamedTuple):
    """A file behind a URL, and how long it may take to answer."""

    files: Any  # fsspec's file system
    path: str
    timeout: float  # seconds

    @property
    def url(self) -> str:
        """The file as a user would name it."""
        return str(self.files.unstrip_protocol(self.path))

    def ask(self, request: Callable[[], T]) -> T:
        """What a request returns.

        Raises:
            OSError: It failed, or took too long; the file is named.
        """
        try:
            return within(self.timeout, request, what=self.url)
        except Exception as error:
            if isinstance(error, FileNotFoundError | TimeoutError) and str(error):
                raise  # these name the file
            raise OSError(f"{self.url}: {str(error) or repr(error)}") from error

    def read(self) -> bytes:
        """All of it."""
        content: bytes = self.ask(lambda: self.files.cat_file(self.path))
        return content

    def find_tag(self) -> str | None:
        """What changes with the file's content (HTTP's ETag), where its file system says it."""
        info: dict[str, Any] = self.ask(lambda: self.files.info(self.path))
        return next((str(info[key]) for key in ("ETag", "etag") if info.get(key)), None)


def open_url(url: str, *, timeout: float) -> RemoteFile:
    """The file or folder at a URL; nothing is asked yet.

    Raises:
        ValueError: fsspec knows no such scheme, or lacks its package.
    """
    try:
        files, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url} can't be read: {error}") from error
    return RemoteFile(files, path.rstrip("/"), timeout)


class RemoteTokens:
    """Slices of a remote file of tokens; those that were announced come from one request."""

    def __init__(self, file: RemoteFile, dtype: np.dtype[Any]) -> None:
        self.file, self.dtype = file, dtype
        self._fetched: dict[tuple[int, int], bytes] = {}

    def __getitem__(self, where: slice) -> npt.NDArray[np.integer[Any]]:
        size = self.dtype.itemsize
        span = where.start * size, where.stop * size
        content = self._fetched.get(span)
        if content is None:
            content = self.file.ask(lambda: self.file.files.cat_file(self.file.path, *span))
        wanted = span[1] - span[0]
        if len(content) < wanted:
            raise OSError(f"{self.file.url} is shorter than the corpus' manifest says")
        if len(content) > wanted:
            raise OSError(
                f"{self.file.url}: the server sends the whole file when it is asked for a range; "
                "raise data.cache_bytes until all shards have a local copy, or use another server"
            )
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
        by_system.setdefault(id(tokens.file.files), []).append((tokens, start * size, stop * size))
    for ranges in by_system.values():
        contents = ranges[0][0].file.ask(lambda: _cat_ranges(ranges))  # noqa: B023
        by_file: dict[int, dict[tuple[int, int], bytes]] = {}
        for (tokens, *span), content in zip(ranges, contents, strict=True):
            by_file.setdefault(id(tokens), {})[span[0], span[1]] = content
        for tokens in {id(tokens): tokens for tokens, _, _ in ranges}.values():
            tokens.keep(by_file[id(tokens)])


def _cat_ranges(ranges: list[tuple[RemoteTokens, int, int]]) -> list[bytes]:
    contents: list[bytes] = ranges[0][0].file.files.cat_ranges(
        [tokens.file.path for tokens, _, _ in ranges],
        [start for _, start, _ in ranges],
        [stop for _, _, stop in ranges],
        on_error="raise",
    )
    for content in contents:
        if isinstance(content, Exception):  # fsspec 2024.2 returns those of HTTP and S3
            raise content
    return contents
