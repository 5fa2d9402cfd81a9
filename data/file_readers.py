"""Documents out of local files: text, jsonl and parquet, plain or compressed.

Every reader yields {"text": str | None} and raises ValueError with the file and the place in it.
"""

import bz2
import gzip
import io
import json
import logging
import lzma
import tokenize
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from data.config import Format

log = logging.getLogger(__name__)

Example = dict[str, str | None]

FORMATS = {
    ".jsonl": Format.jsonl,
    ".ndjson": Format.jsonl,
    ".json": Format.jsonl,
    ".parquet": Format.parquet,
}


def _open_zstd(path: Path) -> io.BufferedReader:
    # python-zstandard 0.25 ends without an error where a file is cut short; Arrow notices.
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)


def read_python_source(paths: list[str]) -> Iterator[Example]:
    """One document per Python file, decoded as PEP 263 says.

    A file that its own declaration does not decode (the standard library's tests hold some on
    purpose) is left out, which is logged.
    """
    for path in paths:
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            log.info("left out %s, which does not decode as Python source: %s", path, error)
        else:
            yield {"text": text}


def read_files(paths: list[str], *, format: Format, text_column: str) -> Iterator[Example]:
    """The documents of each file in turn.

    Raises:
        ValueError: A file is not UTF-8, is not what its format says, lacks the text column, or
            its compressed data are damaged.
    """
    for path in map(Path, paths):
        match find_format(path) if format is Format.auto else format:
            case Format.jsonl:
                yield from read_jsonl(path, text_column)
            case Format.parquet:
                yield from read_parquet(path, text_column)
            case _:
                yield {"text": read_text(path)}


def find_format(path: Path) -> Format:
    """The format by the file's name, compression aside; an unknown name is text."""
    name = path.with_suffix("") if path.suffix in DECOMPRESSORS else path
    return FORMATS.get(name.suffix, Format.text)


def read_text(path: Path) -> str:
    """The file as one document, line ends as they are."""
    with _open(path) as file:
        content = file.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path, error.start)) from error


def read_jsonl(path: Path, text_column: str) -> Iterator[Example]:
    """One document per line; blank lines are passed over."""
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield {"text": _parse_line(path, number, line, offset, text_column)}
            offset += len(line)


def _parse_line(path: Path, number: int, line: bytes, offset: int, column: str) -> str | None:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path, offset + error.start)) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {number} is not JSON ({error}); mend or remove the line, "
            "or set data.format if these are not JSON lines"
        ) from error
    if not isinstance(fields, dict) or column not in fields:
        found = ", ".join(fields) if isinstance(fields, dict) else f"a {type(fields).__name__}"
        raise ValueError(
            f"{path}, line {number} has no data.text_column={column}, it holds {found}; "
            "name the key that holds the text"
        )
    text = fields[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"{path}, line {number}: {column} should be a string, found {type(text).__name__}; "
            "choose another data.text_column"
        )
    return text


def read_parquet(path: Path, text_column: str) -> Iterator[Example]:
    """One document per row, read in batches of rows."""
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a parquet file or is cut short ({error}); remove it, or set data.format"
        ) from error
    with table:
        schema = table.schema_arrow
        if text_column not in schema.names:
            raise ValueError(
                f"{path} has no data.text_column={text_column}, its columns are "
                f"{', '.join(schema.names)}; name the one that holds the text"
            )
        kind = schema.field(text_column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(
                f"{path}: column {text_column} should hold strings, found {kind}; "
                "choose another data.text_column"
            )
        for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
            yield from ({"text": text} for text in batch.column(0).to_pylist())


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    open_binary = DECOMPRESSORS.get(path.suffix, partial(open, mode="rb"))
    try:
        with open_binary(path) as file:
            yield file
    except DAMAGED as error:
        if path.suffix not in DECOMPRESSORS or getattr(error, "errno", None) is not None:
            raise  # the file system's trouble, not the content's
        raise ValueError(
            f"{path} cannot be decompressed ({error}): it is damaged or cut short; "
            "fetch it again or leave it out of data.paths"
        ) from error


def _not_utf8(path: Path, offset: int) -> str:
    where = "decompressed byte" if path.suffix in DECOMPRESSORS else "byte"
    return (
        f"{path} is not UTF-8 at {where} {offset}; convert it (iconv -f ENCODING -t UTF-8) "
        "or leave it out of data.paths"
    )
