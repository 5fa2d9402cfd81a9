"""Requests to a file system behind a URL (any that fsspec knows), whose failures are OSErrors.

File systems raise what their clients do (aiohttp's errors are no OSErrors) and wait as long as
these like; a run saves and stops at an OSError.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, groupby
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt

from data.failure import ReadError, is_lasting
from data.retry import Arrived, within

RANGES_AT_ONCE = 512  # whose answers count as one sign of life

T = TypeVar("T")

AFTER_THE_PATH = re.compile(r"(?<=://)([^\s'\"?#]*)[?#][^\s'\"]*")

MOST_BETWEEN = 2**15
"""Bytes between two ranges of a file that are fetched along: an answer's delay costs more."""


class Seen(NamedTuple):
    """What a file system says of a file without reading it, where it says so."""

    tag: str | None  # changes with the content (HTTP's ETag)
    num_bytes: int | None


class RemoteFile(NamedTuple):
    """A file behind a URL, and how long it may take to answer."""

    files: Any  # fsspec's file system
    path: str
    timeout: float  # seconds

    @property
    def url(self) -> str:
        """The file as a user would name it."""
        return str(self.files.unstrip_protocol(self.path))

    def ask(self, request: Callable[[Arrived], T]) -> T:
        """What a request returns; it calls what it is handed for each part of a long answer.

        Raises:
            ReadError: It failed, or nothing came for too long; the file is named.
        """
        try:
            return within(self.timeout, request, what=self.url)
        except Exception as error:
            # A server may have led on to a signed URL: what follows ? or # is not for logs.
            text = AFTER_THE_PATH.sub(r"\1", str(error) or repr(error))
            named = text if self.url in text else f"{self.url}: {text}"
            raise ReadError(named, is_lasting=is_lasting(error)) from error

    def read(self) -> bytes:
        """All of it."""
        content: bytes = self.ask(lambda _: self.files.cat_file(self.path))
        return content

    def look(self) -> Seen:
        """What can be known without reading it."""
        info: dict[str, Any] = self.ask(lambda _: self.files.info(self.path))
        tag = next((str(info[key]) for key in ("ETag", "etag") if info.get(key)), None)
        return Seen(tag, info.get("size"))

    def open(self) -> Any:
        """The file, to be read from its beginning on by `read_part`."""
        # Without a block size of its own a web server's client takes what comes, in one request;
        # others ask for just the part.
        return self.ask(lambda _: self.files.open(self.path, "rb", block_size=0))

    def read_part(self, opened: Any, most: int) -> bytes:
        """So many bytes more, or what is left."""

        def read(arrived: Arrived) -> bytes:
            parts: list[bytes] = []
            left = most
            while left and (part := opened.read(left)):
                arrived()
                parts.append(part)
                left -= len(part)
            return b"".join(parts)

        return self.ask(read)


def open_url(url: str, *, timeout: float) -> RemoteFile:
    """The file or folder at a URL; nothing is asked yet.

    Raises:
        ValueError: fsspec knows no such scheme, or lacks its package.
    """
    try:
        files, path = fsspec.url_to_fs(url, **_client_options(url, timeout))
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url} can't be read: {error}") from error
    return RemoteFile(files, path.rstrip("/"), timeout)


def _client_options(url: str, timeout: float) -> dict[str, Any]:
    """A web server's client ends every answer after five minutes, however much comes of it."""
    scheme = url.split("://")[0]
    if scheme not in ("http", "https"):
        return {}
    import aiohttp  # may not be installed; only such URLs need it

    patience = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    given = fsspec.config.conf.get(scheme, {}).get("client_kwargs", {})
    return {"client_kwargs": {"timeout": patience, **given}}


class Stretch(NamedTuple):
    """Consecutive tokens of a remote file, [stop - start]."""

    start: int
    stop: int
    content: npt.NDArray[np.integer[Any]]


class RemoteTokens:
    """Slices of a remote file of tokens; what `fetch` brought here before is not asked again."""

    def __init__(self, file: RemoteFile, dtype: np.dtype[Any]) -> None:
        self.file, self.dtype = file, dtype
        self._fetched: list[Stretch] = []  # sorted, none inside another

    def __getitem__(self, where: slice) -> npt.NDArray[np.integer[Any]]:
        found = self.find(where.start, where.stop)
        if found is None:
            span = where.start * self.dtype.itemsize, where.stop * self.dtype.itemsize
            content = self.file.ask(lambda _: self.file.files.cat_file(self.file.path, *span))
            found = self.check(where.start, where.stop, content)
        return found.content[where.start - found.start : where.stop - found.start]

    def find(self, start: int, stop: int) -> Stretch | None:
        """What was fetched and holds all of the tokens in [start, stop)."""
        at = bisect_right(self._fetched, start, key=lambda held: held.start) - 1
        return self._fetched[at] if at >= 0 and self._fetched[at].stop >= stop else None

    def check(self, start: int, stop: int, content: bytes) -> Stretch:
        """The answer to a request for the tokens in [start, stop).

        Raises:
            OSError: It is not what was asked for.
        """
        wanted = (stop - start) * self.dtype.itemsize
        if len(content) < wanted:
            raise ReadError(f"{self.file.url} is shorter than the corpus' manifest says")
        if len(content) > wanted:
            raise ReadError(
                f"{self.file.url}: the server sends the whole file when it is asked for a range; "
                "raise data.cache_bytes until all shards have a local copy, or use another server",
                is_lasting=True,
            )
        return Stretch(start, stop, np.frombuffer(content, self.dtype))

    def keep(self, stretches: list[Stretch]) -> None:
        """What slices are taken from until `drop`."""
        held = sorted(self._fetched + stretches, key=lambda one: (one.start, -one.stop))
        stops = accumulate((one.stop for one in held), max, initial=0)
        self._fetched = [one for one, stop in zip(held, stops, strict=False) if one.stop > stop]

    def drop(self) -> None:
        """Let go of all that was fetched."""
        self._fetched = []


Wanted = tuple[RemoteTokens, int, int]
"""Tokens in [start, stop) of a remote file."""


def fetch(wanted: Iterable[Wanted]) -> None:
    """Bring ranges of tokens here that are not here yet, those of one file system in one request.

    Ranges that lie close to each other in a file become one.

    Raises:
        OSError: They can't be read.
    """
    by_system: dict[int, list[Wanted]] = {}
    for tokens, start, stop in _join(wanted):
        by_system.setdefault(id(tokens.file.files), []).append((tokens, start, stop))
    for ranges in by_system.values():
        contents = ranges[0][0].file.ask(lambda arrived: _cat_ranges(ranges, arrived))  # noqa: B023
        answers = zip(ranges, contents, strict=True)
        for tokens, answered in groupby(answers, key=lambda answer: answer[0][0]):
            tokens.keep([tokens.check(start, stop, got) for (_, start, stop), got in answered])


def _join(wanted: Iterable[Wanted]) -> Iterator[Wanted]:
    """The ranges that are missing, file by file, with the gaps that cost less than a request."""
    by_file: dict[int, list[Wanted]] = {}
    for one in wanted:
        by_file.setdefault(id(one[0]), []).append(one)
    for ranges in by_file.values():
        tokens = ranges[0][0]
        missing = sorted((a, b) for _, a, b in ranges if tokens.find(a, b) is None)
        gap = MOST_BETWEEN // tokens.dtype.itemsize
        joined: list[tuple[int, int]] = []
        for start, stop in missing:
            if joined and start <= joined[-1][1] + gap:
                start, last = joined.pop()
                stop = max(stop, last)
            joined.append((start, stop))
        for start, stop in joined:
            yield tokens, start, stop


def _cat_ranges(ranges: list[Wanted], arrived: Arrived) -> list[bytes]:
    files = ranges[0][0].file.files
    contents: list[bytes] = []
    for first in range(0, len(ranges), RANGES_AT_ONCE):
        some = ranges[first : first + RANGES_AT_ONCE]
        sizes = [tokens.dtype.itemsize for tokens, _, _ in some]
        contents += files.cat_ranges(
            [tokens.file.path for tokens, _, _ in some],
            [start * size for (_, start, _), size in zip(some, sizes, strict=True)],
            [stop * size for (_, _, stop), size in zip(some, sizes, strict=True)],
            on_error="raise",
        )
        arrived()
    for content in contents:
        if isinstance(content, Exception):  # fsspec 2024.2 returns those of HTTP and S3
            raise content
    return contents
