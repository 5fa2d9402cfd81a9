"""Local files become documents, and what is wrong with one is said with its place."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.ipc  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import zstandard

from data.config import Damaged, FilesData, Format, HubData, StdlibData
from data.corpus import find_sources, read_documents
from data.document import Document
from data.file_readers import Example, read_files, read_python_source

TEXTS = ["first\r\nline\n", "", "zwölf \u2581 Boxkämpfer\n\n", "\0\tend"]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(
    *paths: Path,
    format: Format = Format.auto,
    text_column: str = "text",
    damaged: Damaged = Damaged.refuse,
) -> list[Example]:
    names = [str(path) for path in paths]
    return list(read_files(names, format=format, text_column=text_column, damaged=damaged))


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{number}.txt{suffix}" for number in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_bytes(COMPRESSIONS[suffix](text.encode()))
    assert [example["text"] for example in read(*paths)] == TEXTS


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_json_line_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](b"\n" + json_lines(TEXTS)))
    assert [example["text"] for example in read(path)] == TEXTS


def test_a_parquet_row_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    table = pyarrow.table({"id": range(5), "body": [*TEXTS, None]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert [example["text"] for example in read(path, text_column="body")] == [*TEXTS, None]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_an_arrow_row_is_one_document(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.arrow"
    table = pyarrow.table({"id": range(5), "body": [*TEXTS, None]})
    new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert [example["text"] for example in read(path, text_column="body")] == [*TEXTS, None]
    with pytest.raises(ValueError, match=r"no data\.text_column=text, its columns are id, body"):
        read(path)
    path.write_bytes(path.read_bytes()[:-40])
    if kind == "file":
        with pytest.raises(ValueError, match=r"corpus\.arrow is not an Arrow file.*is cut short"):
            read(path, text_column="body")


def test_what_datasets_caches_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    assert [example["text"] for example in read(path)] == TEXTS


def test_damaged_documents_are_left_out_with_the_reason_if_asked(tmp_path: Path) -> None:
    lines = tmp_path / "corpus.jsonl"
    lines.write_bytes(
        b'{"text": "a"}\n{"text": "cut in ha\n{"text": "\xff"}\n[1]\n{"text": 7}\n{"body": "x"}\n'
        b'{"text": "\\ud800"}\n\0\n{"text": "z"}\n' + b"[" * 100_000
    )
    expected = ["not_json", "not_utf8", *["no_text"] * 3, "not_utf8", "not_json"]
    found = read(lines, damaged=Damaged.leave_out)
    assert [example.get("left_out") for example in found] == [None, *expected, None, "not_json"]
    assert [example["text"] for example in found if "left_out" not in example] == ["a", "z"]
    latin, good = tmp_path / "latin.txt", tmp_path / "good.txt"
    latin.write_bytes(b"abc\xe4")
    good.write_bytes(b"good")
    found = read(latin, good, damaged=Damaged.leave_out)
    assert found == [{"text": None, "left_out": "not_utf8"}, {"text": "good"}]
    binary = pyarrow.array([b"ok", b"\xff\xfe", b"z"])
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    table = tmp_path / "corpus.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), table)
    with pytest.raises(ValueError, match=r"corpus\.parquet, row 1 is not UTF-8 at byte 0"):
        read(table)
    found = read(table, damaged=Damaged.leave_out)
    assert [example.get("left_out") for example in found] == [None, "not_utf8", None]


def test_the_format_can_be_given_against_the_name(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(json_lines(TEXTS))
    assert [example["text"] for example in read(path, format=Format.jsonl)] == TEXTS


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("früher".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 at byte 2; convert it"):
        read(path)
    packed = tmp_path / "latin.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "\xff"}\n'))
    with pytest.raises(ValueError, match="not UTF-8 at decompressed byte 24"):
        read(packed)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "cut in ha', r"line 2 is not JSON .*; mend or remove the line"),
        (b'{"body": "x", "id": 3}', r"line 2 has no data\.text_column=text, it holds body, id"),
        (b"[1, 2]", r"line 2 has no data\.text_column=text, it holds a list"),
        (b'{"text": 7}', r"line 2: text should be a string, found int"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=complaint):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_cut_short_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](json_lines(TEXTS * 50))[:-20])
    with pytest.raises(ValueError, match=r"cannot be decompressed .*it is damaged or cut short"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_that_were_concatenated_are_read_whole(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](json_lines(TEXTS)) * 2)
    assert [example["text"] for example in read(path)] == TEXTS * 2


def test_a_missing_file_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.gz")


def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path) -> None:
    for name in ("text.gz", "text.bz2", "text.xz", "text.zst", "text.parquet"):
        (tmp_path / name).write_bytes(b"plain text, nothing else")
        with pytest.raises(ValueError, match=f"{name} (cannot be decompressed|is not a parquet)"):
            read(tmp_path / name)


def test_a_parquet_file_without_the_column_is_named_with_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(ValueError, match=r"no data\.text_column=text, its columns are id, body"):
        read(path)
    with pytest.raises(ValueError, match="column id should hold strings, found int64"):
        read(path, text_column="id")


def test_python_source_is_decoded_as_it_declares(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_bytes("# -*- coding: latin-1 -*-\nname = 'ä'\n".encode("latin-1"))
    bad.write_bytes(b"# coding: utf-8\n'\xff'\n")
    examples = list(read_python_source([str(bad), str(good)]))
    assert examples == [{"text": "# -*- coding: latin-1 -*-\nname = 'ä'\n"}]


def test_globs_are_read_in_order_and_each_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    patterns = [f"{tmp_path}/**/*.txt", f"{tmp_path}/a.txt"]
    config = FilesData(folder="unused", paths=patterns)
    assert [document.text for document in read_documents(config)] == [
        *(b"a.txt", b"b.txt", b"deep/er/c.txt")
    ]


def test_a_glob_without_a_match_is_refused(tmp_path: Path) -> None:
    config = FilesData(folder="unused", paths=[f"{tmp_path}/*.txt"])
    with pytest.raises(ValueError, match=r"data\.paths: .*\*\.txt matches no file"):
        find_sources(config)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "ok"}\n{"text": "a\\ud800"}\n')
    config = FilesData(folder="unused", paths=[f"{tmp_path}/corpus.jsonl"])
    with pytest.raises(
        ValueError, match=r"corpus\.jsonl, line 2 holds half a surrogate pair at character 1"
    ):
        list(read_documents(config))


def test_the_standard_library_is_read_without_its_tests_unless_asked() -> None:
    names = [path.name for path in find_sources(StdlibData(folder="unused"))]
    all_paths = find_sources(StdlibData(folder="unused", include_tests=True))
    assert {"textwrap.py", "heapq.py"} <= set(names)
    assert len(names) > 400
    assert len(all_paths) > len(names)
    assert not any("site-packages" in path.parts for path in all_paths)


@pytest.fixture
def local_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that `datasets` loads by its path, as it would load a name from the hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(json_lines(TEXTS).replace(b'"text"', b'"body"'))
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_are_read_streaming_or_not(local_dataset: str, streaming: bool) -> None:
    config = HubData(folder="unused", name=local_dataset, text_column="body", streaming=streaming)
    assert list(read_documents(config)) == [Document(text.encode()) for text in TEXTS]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_without_the_column_are_refused(local_dataset: str, streaming: bool) -> None:
    config = HubData(folder="unused", name=local_dataset, streaming=streaming)
    with pytest.raises(ValueError, match=r"no data\.text_column=text, its columns are id, body"):
        list(read_documents(config))


def test_hub_data_without_the_split_are_refused(local_dataset: str) -> None:
    config = HubData(folder="unused", name=local_dataset, split="test", text_column="body")
    with pytest.raises(ValueError, match=r"cannot be loaded .*check data\.name, data\.subset"):
        list(read_documents(config))
