"""Preparing is deterministic, continues after a kill, notices changes and does nothing twice."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from data.config import FilesData, HubData, StdlibData
from data.encode_shard import choose_split
from data.fim import FimConfig
from data.manifest import Manifest, Split, read_manifest
from data.prepare import Prepared, prepare
from data.progress import Advance
from data.retry import RetryConfig
from data.shards import Shard
from data.tokenizer import ModelType, TokenizerConfig, load_tokenizer

ConfigMaker = Callable[..., FilesData]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decode_split(folder: Path, manifest: Manifest, split: Split) -> list[str]:
    """Every document of a split, found by the index alone."""
    tokenizer = load_tokenizer(folder / manifest.tokenizer.file.name)
    texts = []
    for record in manifest.split(split).shards:
        shard = Shard(folder / record.name)
        borders = [*shard.document_starts(0, len(shard.tokens)), len(shard.tokens)]
        for start, stop in pairwise(borders):
            ids = shard.tokens[start:stop].tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            texts.append(tokenizer.decode(ids[1:-1]))
    return texts


def test_every_document_is_in_its_split_in_order(prepared: Prepared, documents: list[str]) -> None:
    assert len(prepared.manifest.train.shards) > 2
    for split in Split:
        expected = [text for text in documents if choose_split(text.encode(), 0.2) is split]
        assert decode_split(prepared.folder, prepared.manifest, split) == expected
        record = prepared.manifest.split(split)
        assert record.documents == len(expected)
        assert record.text_bytes == sum(len(text.encode()) for text in expected)


def test_the_manifest_lists_the_files_as_they_are(prepared: Prepared) -> None:
    manifest = read_manifest(prepared.folder)
    assert manifest == prepared.manifest
    listed = [manifest.tokenizer.file, manifest.origin]
    for split in (manifest.train, manifest.validation):
        assert split.index is not None
        assert split.prompts is None
        listed += [
            split.unigram,
            split.index,
            *(file for x in split.shards for file in (x.bin, x.idx)),
        ]
        assert split.tokens == sum(shard.tokens for shard in split.shards)
    for record in listed:
        content = (prepared.folder / record.name).read_bytes()
        assert record.sha256 == sha256(content).hexdigest()
        assert record.num_bytes == len(content)
    present = {path.name for path in prepared.folder.iterdir()}
    assert present == {record.name for record in listed} | {
        *("manifest.json", "report.json", "prepare.lock")
    }


def test_two_runs_write_the_same_bytes_whatever_the_number_of_processes(
    prepared: Prepared, make_config: ConfigMaker, tmp_path: Path
) -> None:
    prepare(make_config(tmp_path, processes=3))
    assert read_folder(tmp_path) == read_folder(prepared.folder)


def test_a_second_run_does_nothing_and_says_so(
    make_config: ConfigMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path)
    assert not prepare(config).was_ready
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*[!k]")}
    with caplog.at_level("INFO"):
        again = prepare(config)
    assert again.was_ready
    assert "is prepared already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*[!k]")} == times


PREPARE_AND_DIE = """
import sys
from data.config import FilesData
from data.prepare import prepare
from data.tokenizer import TokenizerConfig
from tests.data.dying import Dying

if __name__ == "__main__":
    folder, source = sys.argv[1:]
    config = FilesData(
        folder=folder, paths=[source], tokenizer=TokenizerConfig(vocab_size=400),
        validation_fraction=0.2, shard_bytes=6000, processes=2,
    )
    prepare(config, progress=Dying("tokenize", shards=3))
"""


@pytest.fixture
def killed(tmp_path: Path, corpus_file: Path) -> Path:
    """The folder of a prepare that was killed after it had finished three shards."""
    folder = tmp_path / "corpus"
    script = [sys.executable, "-c", PREPARE_AND_DIE, str(folder), str(corpus_file)]
    root = Path(__file__).parents[2]
    process = subprocess.run(script, env=os.environ | {"PYTHONPATH": str(root)}, check=False)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    return folder


def test_a_killed_run_continues_to_the_same_bytes_and_keeps_its_shards(
    killed: Path, prepared: Prepared, make_config: ConfigMaker
) -> None:
    finished = sorted(path.stem for path in (killed / "finished_shards").glob("*.json"))
    assert 3 <= len(finished) <= 5  # of 6; two more may have been under way
    kept = [killed / f"train-{number}.bin" for number in finished]
    times = [path.stat().st_mtime_ns for path in kept]
    assert not prepare(make_config(killed)).was_ready
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert read_folder(killed) == read_folder(prepared.folder)


def test_a_killed_run_does_not_continue_with_other_settings(
    killed: Path, make_config: ConfigMaker
) -> None:
    with pytest.raises(ValueError, match=r"data\.shard_bytes was 6000, is 7000"):
        prepare(make_config(killed, shard_bytes=7000))


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"validation_fraction": 0.3}, r"data\.validation_fraction was 0\.2, is 0\.3"),
        (
            {"tokenizer": TokenizerConfig(vocab_size=400, model_type=ModelType.unigram)},
            r"data\.tokenizer\.model_type was bpe, is unigram",
        ),
        ({"text_column": "body"}, r"data\.text_column was text, is body"),
    ],
)
def test_other_settings_are_refused_with_the_difference_and_the_way_out(
    prepared: Prepared, make_config: ConfigMaker, fields: dict[str, object], difference: str
) -> None:
    with pytest.raises(ValueError, match=f"{difference}.*Choose another data.folder, or delete"):
        prepare(make_config(prepared.folder, **fields))


def test_settings_of_reading_alone_may_change(prepared: Prepared, make_config: ConfigMaker) -> None:
    config = make_config(
        prepared.folder,
        packing="best_fit",
        fim=FimConfig(rate=1),
        mask_documents=False,
        reset_positions=False,
        verify="fast",
        processes=2,
        retry=RetryConfig(attempts=1),
        cache_bytes=1,
    )
    assert prepare(config).was_ready


def test_a_reading_setting_that_an_older_corpus_kept_does_not_count(
    prepared: Prepared, make_config: ConfigMaker, tmp_path: Path
) -> None:
    folder = shutil.copytree(prepared.folder, tmp_path / "older")
    path = folder / "origin.json"
    origin = json.loads(path.read_text())
    origin["settings"]["retry"] = {"attempts": 99}
    path.write_text(json.dumps(origin))
    assert prepare(make_config(folder)).was_ready


def test_changed_input_is_refused_with_the_files(
    prepared: Prepared, make_config: ConfigMaker, tmp_path: Path
) -> None:
    sources = tmp_path / "source"
    sources.mkdir()
    for name in "abcd":
        lines = [json.dumps({"text": f"{name} {number} in {name}"}) for number in range(40)]
        (sources / f"{name}.jsonl").write_text("\n".join(lines))
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))
    config = make_config(tmp_path / "corpus", paths=[f"{sources}/*.jsonl"], tokenizer=tokenizer)
    prepare(config)
    content = (sources / "a.jsonl").read_text()
    (sources / "a.jsonl").write_text(content.replace("a 0", "a x"))  # of the same size
    (sources / "b.jsonl").unlink()
    (sources / "e.jsonl").write_text(content)
    expected = r"a\.jsonl has changed; .*b\.jsonl is gone; .*e\.jsonl is new\. Choose another"
    with pytest.raises(ValueError, match=expected):
        prepare(config)


def test_a_finished_corpus_that_lost_a_shard_is_not_called_finished(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    config = make_config(tmp_path)
    prepare(config)
    (tmp_path / "train-00001.bin").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.bin is missing"):
        prepare(config)


@pytest.mark.parametrize("given", [False, True])
def test_an_empty_corpus_is_refused_and_leaves_the_way_free(
    given: bool,
    prepared: Prepared,
    make_config: ConfigMaker,
    corpus_file: Path,
    tmp_path: Path,
) -> None:
    source = tmp_path / "empty.jsonl"
    tokenizer = TokenizerConfig(vocab_size=400)
    if given:
        tokenizer.path = str(prepared.folder / "tokenizer.model")
    config = make_config(tmp_path / "corpus", paths=[str(source)], tokenizer=tokenizer)
    for content in ("", '{"text": ""}\n{"text": null}\n'):
        source.write_text(content)
        with pytest.raises(ValueError, match="the corpus data=files is empty: no document"):
            prepare(config)
    source.write_bytes(corpus_file.read_bytes())
    assert prepare(config).manifest.train.documents > 50


def test_a_split_without_documents_is_refused(make_config: ConfigMaker, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation_fraction=1e-09 leaves no document for vali"):
        prepare(make_config(tmp_path, validation_fraction=1e-9))
    with pytest.raises(ValueError, match=r"validation_fraction=0\.999999 leaves no .* for train"):
        prepare(make_config(tmp_path, validation_fraction=0.999999))
    assert not prepare(make_config(tmp_path)).was_ready


def test_empty_documents_are_counted_and_left_out(
    make_config: ConfigMaker, corpus_file: Path, prepared: Prepared, tmp_path: Path
) -> None:
    source = tmp_path / "some_empty.jsonl"
    source.write_text('{"text": ""}\n' + corpus_file.read_text() + '{"text": null}\n')
    manifest = prepare(make_config(tmp_path / "corpus", paths=[str(source)])).manifest
    assert manifest.empty_documents == 2
    assert manifest.train.documents == prepared.manifest.train.documents


def test_a_bad_file_stops_the_run_with_its_name(make_config: ConfigMaker, tmp_path: Path) -> None:
    source = tmp_path / "latin.txt"
    source.write_bytes(b"abc\xe4")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 at byte 3"):
        prepare(make_config(tmp_path / "corpus", paths=[str(source)]))


def test_a_given_tokenizer_is_copied_and_its_change_noticed(
    prepared: Prepared, make_config: ConfigMaker, tmp_path: Path
) -> None:
    given = tmp_path / "given.model"
    given.write_bytes((prepared.folder / "tokenizer.model").read_bytes())
    config = make_config(tmp_path / "corpus", tokenizer=TokenizerConfig(path=str(given)))
    manifest = prepare(config).manifest
    assert manifest.train.shards == prepared.manifest.train.shards
    assert (tmp_path / "corpus" / "tokenizer.model").read_bytes() == given.read_bytes()
    given.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"data\.tokenizer\.fingerprint was"):
        prepare(config)


@pytest.mark.slow
def test_a_corpus_may_be_given_its_own_tokenizer(
    prepared: Prepared, make_config: ConfigMaker, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((prepared.folder / "tokenizer.model").read_bytes())
    tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer.model"))
    manifest = prepare(make_config(tmp_path, tokenizer=tokenizer)).manifest
    assert manifest.train == prepared.manifest.train


def test_shards_are_listed_in_order_though_a_large_one_is_finished_late(
    make_config: ConfigMaker, documents: list[str], tmp_path: Path
) -> None:
    texts = ["".join(documents) * 60, *documents]  # a second's work, then little
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = make_config(tmp_path / "corpus", paths=[str(source)], processes=2)
    manifest = prepare(config).manifest
    for split in Split:
        names = [shard.name for shard in manifest.split(split).shards]
        assert names == sorted(names)


class KillingWorkers:
    """Progress that kills the worker processes at the first sign of theirs."""

    @contextmanager
    def stage(self, name: str, *, total_bytes: int | None) -> Iterator[Advance]:
        def kill(num_bytes: int) -> None:
            for child in psutil.Process().children() if name == "tokenize" else []:
                with suppress(psutil.NoSuchProcess):  # killed a moment ago
                    if any("spawn_main" in argument for argument in child.cmdline()):
                        child.kill()

        yield kill


def test_a_dead_worker_is_reported_and_its_work_done_by_the_next_run(
    prepared: Prepared, make_config: ConfigMaker, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="a worker process died, perhaps for want of mem"):
        prepare(make_config(tmp_path), progress=KillingWorkers())
    prepare(make_config(tmp_path))
    assert read_folder(tmp_path) == read_folder(prepared.folder)


def test_two_runs_in_one_folder_are_refused(make_config: ConfigMaker, tmp_path: Path) -> None:
    with open(tmp_path / "prepare.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being prepared by another process"):
            prepare(make_config(tmp_path))


def test_a_finished_corpus_needs_no_lock(prepared: Prepared, make_config: ConfigMaker) -> None:
    with open(prepared.folder / "prepare.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert prepare(make_config(prepared.folder)).was_ready


def test_what_a_killed_run_left_behind_is_cleared_unless_it_is_still_at_it(
    prepared: Prepared, make_config: ConfigMaker, tmp_path: Path
) -> None:
    folder = shutil.copytree(prepared.folder, tmp_path / "corpus")
    left = folder / "finished_shards" / "00000.json"
    left.parent.mkdir()
    left.touch()
    with open(folder / "prepare.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        prepare(make_config(folder))
        assert left.exists()
    prepare(make_config(folder))
    assert not left.parent.exists()


def test_a_validation_document_stays_one_when_data_are_added(
    prepared: Prepared, make_config: ConfigMaker, corpus_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "more.jsonl"
    more = "".join(json.dumps({"text": f"new document {x}"}) + "\n" for x in range(50))
    source.write_text(more + corpus_file.read_text())
    larger = prepare(make_config(tmp_path / "corpus", paths=[str(source)]))
    before = set(decode_split(prepared.folder, prepared.manifest, Split.validation))
    after = set(decode_split(larger.folder, larger.manifest, Split.validation))
    assert before < after


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_folder_is_prepared_through_the_hubs_reader(
    streaming: bool,
    prepared: Prepared,
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = HubData(
        folder=str(tmp_path / "corpus"),
        name=str(corpus_file.parent),
        streaming=streaming,
        tokenizer=TokenizerConfig(vocab_size=400),
        validation_fraction=0.2,
        shard_bytes=6000,
        processes=1,
    )
    assert prepare(config).manifest.train == prepared.manifest.train


def test_the_standard_library_is_prepared(tmp_path: Path) -> None:
    tokenizer = TokenizerConfig(vocab_size=1000, train_bytes=500_000)
    config = StdlibData(folder=str(tmp_path), tokenizer=tokenizer, shard_bytes=2_000_000)
    manifest = prepare(config).manifest
    assert manifest.train.documents + manifest.validation.documents > 400
    assert manifest.train.text_bytes > 5_000_000
    assert manifest.tokenizer.size == 1000
