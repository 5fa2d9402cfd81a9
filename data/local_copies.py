"""The local folder with copies of files that lie behind a URL: whole ones, and room for more."""

import errno
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.atomic_file import PARTIAL, hash_file
from data.failure import ReadError, is_lasting
from data.manifest import FILE, FileRecord
from data.mirror import CACHE_VARIABLE

LEFT_SECONDS = 3600  # since a copy was last written to, after which nobody is making it
GB = 1e9


class LocalCopies:
    """Copies of `url` in `folder`; `most` is what `data.cache_bytes` says."""

    def __init__(self, folder: Path, *, url: str, most: int) -> None:
        self.folder = folder
        self._url = url
        self._most = most

    def open(self) -> None:
        """Make the folder if need be, and remove what processes were copying when they were
        killed.

        Raises:
            ReadError: It can't be made.
        """
        with self.explained(0):
            self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"*{PARTIAL}"):
            with suppress(OSError):  # another rank may remove it too, or none may
                if time.time() - path.stat().st_mtime > LEFT_SECONDS:
                    path.unlink()

    def is_whole(self, record: FileRecord) -> bool:
        """Whether there is a copy; it was checked by its hash before it got its name."""
        path = self.folder / record.name
        return path.is_file() and path.stat().st_size == record.num_bytes

    def refuse_damaged(self, records: Iterable[FileRecord]) -> None:
        """Raises ValueError where a copy's hash is wrong by now."""
        for record in records:
            path = self.folder / record.name
            if self.is_whole(record) and hash_file(path) != record.sha256:
                raise ValueError(
                    f"{path} does not match its sha256 in {FILE}: the copy is damaged; delete it, "
                    "and it is copied again"
                )

    def refuse_without_room(self, records: Iterable[FileRecord]) -> None:
        """Raises ReadError where copies of all these files don't fit on the disk."""
        needed = sum(record.num_bytes for record in records if not self.is_whole(record))
        if needed > shutil.disk_usage(self.folder).free:
            raise self._no_room(needed)

    @contextmanager
    def explained(self, num_bytes: int) -> Iterator[None]:
        """While entered, a failure to write so many bytes names the disk and the way out.

        Raises:
            ReadError: Such a failure.
        """
        try:
            yield
        except ReadError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_room(num_bytes) from error
            raise ReadError(
                f"{self.folder}, where copies from {self._url} are kept, can't be written "
                f"({error}); mend that, or set {CACHE_VARIABLE} to another folder",
                is_lasting=is_lasting(error),
            ) from error

    def _no_room(self, needed: int) -> ReadError:
        usage = shutil.disk_usage(self.folder)
        return ReadError(
            f"copies from {self._url} need {needed:,} bytes more in {self.folder}, whose disk "
            f"({find_mount(self.folder)}) has {usage.free:,} of {usage.total:,} free; make room, "
            f"set {CACHE_VARIABLE} to a folder on a larger disk, or lower "
            f"data.cache_bytes={self._most}, which bounds the copies of training shards",
            is_lasting=True,
        )


def find_mount(path: Path) -> Path:
    """Where the disk that a path lies on is mounted."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_mount())
