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
from data.template import parse_template

log = logging.getLogger(__name__)

Example = dict[str, str | None]


class Fields:
    """What is taken from a row of a file: the text, and the prompt before it if there is one."""

    def __init__(
        self, text_column: str, template: str | None = None, prompt_template: str | None = None
    ) -> None:
        self.text_column = text_column
        self._templates = {
            name: parse_template(text, key=f"data.{key}")
            for name, key, text in (
                ("text", "template", template),
                ("prompt", "prompt_template", prompt_template),
            )
            if text is not None
        }

    @property
    def columns(self) -> dict[str, str]:
        """The columns that must be there, each with the setting that names it."""
        columns = {} if "text" in self._templates else {self.text_column: "data.text_column"}
        for name, template in self._templates.items():
            key = "data.template" if name == "text" else "data.prompt_template"
            columns |= {column: key for column in template.columns if column not in columns}
        return columns

    def take(self, row: dict[str, Any], where: str) -> Example:
        """The row's text and, if there is a template for it, its prompt.

        Raises:
            ValueError: A column is missing or holds something else than text.
        """
        for column, key in self.columns.items():
            if column not in row:
                raise ValueError(
                    f"{where} has no {key}={column}, it holds {', '.join(row)}; "
                    "name the key that holds the text"
                )
        example: Example = {}
        if "text" not in self._templates:
            text = row[self.text_column]
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"{where}: {self.text_column} should be a string, found "
                    f"{type(text).__name__}; choose another data.text_column"
                )
            example["text"] = text
        try:
            for name, template in self._templates.items():
                example[name] = template.fill(row)
        except TypeError as error:
            raise ValueError(f"{where}: {error}; a template takes strings and numbers") from error
        return example


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


def read_files(
    paths: list[str],
    *,
    format: Format,
    text_column: str,
    template: str | None = None,
    prompt_template: str | None = None,
) -> Iterator[Example]:
    """The documents of each file in turn.

    Raises:
        ValueError: A file is not UTF-8, is not what its format says, lacks a column, or its
            compressed data are damaged.
    """
    fields = Fields(text_column, template, prompt_template)
    for path in map(Path, paths):
        match find_format(path) if format is Format.auto else format:
            case Format.jsonl:
                yield from read_jsonl(path, fields)
            case Format.parquet:
                yield from read_parquet(path, fields)
            case _:
                yield fields.take({fields.text_column: read_text(path)}, str(path))


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


def read_jsonl(path: Path, fields: Fields) -> Iterator[Example]:
    """One document per line; blank lines are passed over."""
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield _parse_line(path, number, line, offset, fields)
            offset += len(line)


def _parse_line(path: Path, number: int, line: bytes, offset: int, fields: Fields) -> Example:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(path, offset + error.start)) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {number} is not JSON ({error}); mend or remove the line, "
            "or set data.format if these are not JSON lines"
        ) from error
    if not isinstance(row, dict):
        column, key = next(iter(fields.columns.items()))
        raise ValueError(
            f"{path}, line {number} has no {key}={column}, it holds a {type(row).__name__}; "
            "each line should be an object that holds the text"
        )
    return fields.take(row, f"{path}, line {number}")


def read_parquet(path: Path, fields: Fields) -> Iterator[Example]:
    """One document per row, read in batches of rows."""
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a parquet file or is cut short ({error}); remove it, or set data.format"
        ) from error
    with table:
        check_columns(str(path), table.schema_arrow, fields)
        columns = list(fields.columns)
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            yield from (fields.take(row, str(path)) for row in batch.to_pylist())


def check_columns(where: str, schema: Any, fields: Fields) -> None:
    """Raises ValueError where a table lacks a column, or the text's holds no strings."""
    for column, key in fields.columns.items():
        if column not in schema.names:
            raise ValueError(
                f"{where} has no {key}={column}, its columns are "
                f"{', '.join(schema.names)}; name the one that holds the text"
            )
        kind = schema.field(column).type
        is_text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        if key == "data.text_column" and not is_text:
            raise ValueError(
                f"{where}: column {column} should hold strings, found {kind}; "
                "choose another data.text_column"
            )


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
