"""What real corpora and machines do to a prepare: it counts it, or it stops with a message and a
rerun finishes the work."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.config import Damaged, FilesData
from data.document import Document
from data.encode_shard import encode_document
from data.manifest import Split
from data.prepare import Prepared, prepare
from data.report import read_report
from data.shards import Shard
from data.tokenizer import TokenizerConfig, load_tokenizer
from tests.data.test_prepare import decode_split, read_folder

ConfigMaker = Callable[..., FilesData]


def test_a_text_too_long_for_one_call_is_the_same_text(
    prepared: Prepared, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(prepared.folder / "tokenizer.model")
    texts = [*documents[:20], "a" * 500, "one two " * 100, "x\n" * 300, "▁ " * 200, "1" * 101]
    monkeypatch.setattr("data.encode_shard.LONGEST_PIECE", 100)
    for text in texts:
        ids = encode_document(tokenizer, Document(text.encode()))
        asked = encode_document(tokenizer, Document(text.encode(), prompt=text.encode()))
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode([int(token) for token in ids[1:-1]]) == text
        assert [*asked[0], *asked[1]] == [tokenizer.bos_id, *ids[1:-1], *ids[1:]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that holds a mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_next_run_finishes(
    prepared: Prepared, make_config: ConfigMaker, documents: list[str], small_disk: Path
) -> None:
    source = small_disk.parent / "corpus.jsonl"
    lines = [json.dumps({"text": f"{n} {text}"}) for n in range(3) for text in documents]
    source.write_text("\n".join(lines))
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))
    fields = {"paths": [str(source)], "tokenizer": tokenizer, "shard_bytes": 8000}
    filler = small_disk / "filler"
    needed = (prepared.folder / "tokenizer.model").stat().st_size + 90_000  # not quite enough
    filler.write_bytes(b"x" * (2**20 - needed))
    config = make_config(small_disk / "corpus", **fields)
    with pytest.raises(RuntimeError, match=r"the disk of data\.folder=.* is full .*; finished sha"):
        prepare(config)
    finished = list((small_disk / "corpus" / "finished_shards").glob("*.json"))
    assert finished
    assert not list(small_disk.rglob("*.partial"))
    times = {path: path.stat().st_mtime_ns for path in finished}
    filler.unlink()
    kept = [small_disk / "corpus" / f"train-{path.stem}.bin" for path in times]
    before = [path.stat().st_mtime_ns for path in kept]
    prepare(config)
    assert [path.stat().st_mtime_ns for path in kept] == before
    whole = prepare(make_config(small_disk.parent / "whole", **fields))
    assert read_folder(small_disk / "corpus") == read_folder(whole.folder)


@pytest.mark.slow
def test_a_line_of_200_megabytes_is_one_document(
    prepared: Prepared, make_config: ConfigMaker, documents: list[str], tmp_path: Path
) -> None:
    line = "".join(documents).replace("\n", " ")
    long = line * (200_000_000 // len(line) + 1)
    source = tmp_path / "corpus.jsonl"
    with open(source, "w") as file:
        for text in (*documents, long):
            file.write(json.dumps({"text": text}) + "\n")
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))
    config = make_config(tmp_path / "corpus", paths=[str(source)], tokenizer=tokenizer)
    manifest = prepare(config).manifest
    assert manifest.train.documents + manifest.validation.documents == len(documents) + 1
    records = [record for split in Split for record in manifest.split(split).shards]
    shard = Shard(tmp_path / "corpus" / max(records, key=lambda record: record.tokens).name)
    start, stop = shard.all_starts()[[-2, -1]].tolist()  # the last document of its shard
    model, at = load_tokenizer(Path(str(tokenizer.path))), 0
    for place in range(start + 1, stop - 1, 10**6):  # bit by bit: it is ASCII
        text = model.decode(shard.tokens[place : min(place + 10**6, stop - 1)].tolist())
        assert long.startswith(text, at)
        at += len(text)
    assert at == len(long)


@pytest.mark.slow
def test_a_damaged_corpus_is_counted_or_mended_and_then_finished(
    prepared: Prepared, make_config: ConfigMaker, corpus_file: Path, tmp_path: Path
) -> None:
    """Empty documents, invalid UTF-8, NUL bytes and half a line among good ones."""
    source = tmp_path / "corpus.jsonl"
    good = corpus_file.read_bytes()
    source.write_bytes(
        b'{"text": ""}\n{"text": "\xff"}\n' + good + b'{"text": "a\\u0000b"}\n{"text": "half a li'
    )
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))
    fields = {"paths": [str(source)], "tokenizer": tokenizer}
    counted = prepare(make_config(tmp_path / "counted", **fields, damaged=Damaged.leave_out))
    report = read_report(counted.folder)
    assert report is not None
    assert report["stages"][0]["dropped"] == {"not_utf8": 1, "not_json": 1, "empty": 1}
    texts = [t for split in Split for t in decode_split(counted.folder, counted.manifest, split)]
    assert "a\0b" in texts
    config = make_config(tmp_path / "mended", **fields)
    with pytest.raises(ValueError, match=r"corpus\.jsonl is not UTF-8 at byte 23"):
        prepare(config)
    source.write_bytes(source.read_bytes().replace(b'{"text": "\xff"}\n', b""))
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line \d+ is not JSON"):
        prepare(config)
    source.write_bytes(source.read_bytes().replace(b'{"text": "half a li', b""))
    mended = prepare(config)
    assert mended.manifest.train == counted.manifest.train
    assert mended.manifest.validation == counted.manifest.validation
