"""Files that are either complete or absent, even when the process is killed while writing."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"


@contextmanager
def write_aside(path: Path, *, alone: bool = True) -> Iterator[IO[bytes]]:
    """A file opened beside `path`, flushed to disk and renamed to it if no exception is raised.

    Not `alone` are processes that may write the same content to `path` at once: each has a file
    of its own, which stays behind if it is killed.
    """
    process = "" if alone else f".{os.uname().nodename}-{os.getpid()}"
    aside = path.with_name(path.name + process + PARTIAL)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON in `path`, keys in the order given."""
    with write_aside(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ValueError: The file does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"{path} is not valid JSON, so it is corrupted: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, found {type(value).__name__}")
    return value


def hash_file(path: Path) -> str:
    """sha256 of the file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
