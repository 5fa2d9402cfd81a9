"""Documents out of local files: text, jsonl, parquet and arrow, plain or compressed.

Every reader yields {"text": str | None} and raises ValueError with the file and the place in it.
Where that is the fault of one document, it may be left out instead (`Damaged.leave_out`): then its
reader yields {"text": None, "left_out": why} in its place.
"""

import bz2
import gzip
import io
import json
import logging
import lzma
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.ipc  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from data.config import Damaged, Format
from data.template import parse_template

log = logging.getLogger(__name__)

Example = dict[str, str | None]
NOT_UTF8, NOT_JSON, NO_TEXT = "not_utf8", "not_json", "no_text"

SHOWN = 20  # damaged documents that are logged; the report counts all
_left_out = count()


class DamagedDocument(ValueError):
    """One document cannot be read; the next one can."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def leave_out(error: DamagedDocument, damaged: Damaged) -> Example:
    """What stands for a document that cannot be read; raises `error` where that is refused."""
    if damaged is Damaged.refuse:
        raise error
    if next(_left_out) < SHOWN:
        log.warning("left out: %s", error)
    return {"text": None, "left_out": error.reason}


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
                raise DamagedDocument(
                    f"{where} has no {key}={column}, it holds {', '.join(row)}; "
                    "name the key that holds the text",
                    reason=NO_TEXT,
                )
        example: Example = {}
        if "text" not in self._templates:
            text = row[self.text_column]
            if text is not None and not isinstance(text, str):
                raise DamagedDocument(
                    f"{where}: {self.text_column} should be a string, found "
                    f"{type(text).__name__}; choose another data.text_column",
                    reason=NO_TEXT,
                )
            example["text"] = text
        try:
            for name, template in self._templates.items():
                example[name] = template.fill(row)
        except TypeError as error:
            raise DamagedDocument(
                f"{where}: {error}; a template takes strings and numbers", reason=NO_TEXT
            ) from error
        for text in filter(None, example.values()):
            _check_utf8(text, where)
        return example


def _check_utf8(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DamagedDocument(
            f"{where} holds half a surrogate pair at character {error.start}, which no UTF-8 text "
            "can; mend its \\u escape or leave the document out",
            reason=NOT_UTF8,
        ) from error


FORMATS = {
    ".jsonl": Format.jsonl,
    ".ndjson": Format.jsonl,
    ".json": Format.jsonl,
    ".parquet": Format.parquet,
    ".arrow": Format.arrow,
    ".feather": Format.arrow,
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
    damaged: Damaged = Damaged.refuse,
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
                yield from read_jsonl(path, fields, damaged)
            case Format.parquet:
                yield from read_parquet(path, fields, damaged)
            case Format.arrow:
                yield from read_arrow(path, fields, damaged)
            case _:
                yield read_text(path, fields, damaged)


def find_format(path: Path) -> Format:
    """The format by the file's name, compression aside; an unknown name is text."""
    name = path.with_suffix("") if path.suffix in DECOMPRESSORS else path
    return FORMATS.get(name.suffix, Format.text)


def read_text(path: Path, fields: Fields, damaged: Damaged) -> Example:
    """The file as one document, line ends as they are."""
    with _open(path) as file:
        content = file.read()
    try:
        return fields.take({fields.text_column: _decode(content, path)}, str(path))
    except DamagedDocument as error:
        return leave_out(error, damaged)


def read_jsonl(path: Path, fields: Fields, damaged: Damaged) -> Iterator[Example]:
    """One document per line; blank lines are passed over."""
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                try:
                    yield _parse_line(path, number, line, offset, fields)
                except DamagedDocument as error:
                    yield leave_out(error, damaged)
            offset += len(line)


def _parse_line(path: Path, number: int, line: bytes, offset: int, fields: Fields) -> Example:
    text = _decode(line, path, offset)
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamagedDocument(
            f"{path}, line {number} is not JSON ({error}); mend or remove the line, "
            "or set data.format if these are not JSON lines",
            reason=NOT_JSON,
        ) from error
    if not isinstance(row, dict):
        column, key = next(iter(fields.columns.items()))
        raise DamagedDocument(
            f"{path}, line {number} has no {key}={column}, it holds a {type(row).__name__}; "
            "each line should be an object that holds the text",
            reason=NO_TEXT,
        )
    return fields.take(row, f"{path}, line {number}")


def read_parquet(path: Path, fields: Fields, damaged: Damaged) -> Iterator[Example]:
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
        batches = table.iter_batches(batch_size=1024, columns=columns)
        yield from _read_batches(path, batches, fields, damaged)


def read_arrow(path: Path, fields: Fields, damaged: Damaged) -> Iterator[Example]:
    """One document per row of an Arrow file (Feather), or of a stream as `datasets` caches it."""
    with pyarrow.memory_map(str(path)) as file:
        try:
            try:
                table = pyarrow.ipc.open_file(file)
                batches = (table.get_batch(number) for number in range(table.num_record_batches))
            except pyarrow.ArrowInvalid:
                file.seek(0)
                table = pyarrow.ipc.open_stream(file)
                batches = iter(table)
            check_columns(str(path), table.schema, fields)
            chosen = (batch.select(list(fields.columns)) for batch in batches)
            yield from _read_batches(path, chosen, fields, damaged)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{path} is not an Arrow file or stream, or is cut short ({error}); remove it, or "
                "set data.format"
            ) from error


def _read_batches(
    path: Path, batches: Iterable[Any], fields: Fields, damaged: Damaged
) -> Iterator[Example]:
    number = 0
    for batch in batches:
        for row in range(batch.num_rows):
            where = f"{path}, row {number}"
            try:
                yield fields.take(_take_row(batch, row, where), where)
            except DamagedDocument as error:
                yield leave_out(error, damaged)
            number += 1


def _take_row(batch: Any, row: int, where: str) -> dict[str, Any]:
    try:
        return {name: batch.column(name)[row].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:  # Arrow does not look at the bytes of strings
        raise DamagedDocument(
            f"{where} is not UTF-8 at byte {error.start} of its text; mend it or leave it out",
            reason=NOT_UTF8,
        ) from error


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


def _decode(content: bytes, path: Path, offset: int = 0) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        where = "decompressed byte" if path.suffix in DECOMPRESSORS else "byte"
        raise DamagedDocument(
            f"{path} is not UTF-8 at {where} {offset + error.start}; convert it "
            "(iconv -f ENCODING -t UTF-8) or leave it out of data.paths",
            reason=NOT_UTF8,
        ) from error
