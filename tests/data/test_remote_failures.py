"""What fails when a corpus behind a URL is read: for whom, how often, and what is said of it."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from data import remote as remote_module
from data.arrivals import ARRIVALS
from data.config import DataConfig, FilesData, Verify
from data.failure import ReadError, is_lasting
from data.held_out import open_held_out
from data.manifest import FILE, FileRecord
from data.mirror import mirror_folder
from data.position import Position
from data.prepare import Prepared, prepare
from data.prepared_corpus import bring_here, open_corpora
from data.remote import open_remote
from data.retry import RetryConfig, longest_silence, retry, within
from data.training_data import TrainingData
from tests.data.web_server import WebServer, serve
from tests.ranks import run_ranks
from train.ranks import connect
from train.read import DataError
from train.watch.shard_agreement import agree_on_shards

HASTE = RetryConfig(attempts=3, wait_seconds=0.001)


@pytest.fixture
def web(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    with serve(shutil.copytree(prepared.folder, tmp_path / "served")) as server:
        yield server


def read_config(url: str, **fields: object) -> DataConfig:
    values: dict[str, object] = {"paths": ["not looked at"], "seq_len": 40, "retry": HASTE}
    return FilesData(folder=url, **values | fields)  # type: ignore[arg-type]


def read(data: TrainingData, count: int = 60) -> None:
    data.read(data.draw(data.enter(Position()), count).rows, 5)


def count_waiting(lock: Path) -> int:
    """How many wait for a lock, as the system lists them."""
    with open("/proc/locks") as file:
        lines = [line.split() for line in file]
    inode = str(lock.stat().st_ino)
    return sum(line[1] == "->" and line[6].split(":")[-1] == inode for line in lines)


def test_who_waits_for_a_copy_fails_with_the_one_that_makes_it_without_asking_again(
    web: WebServer, prepared: Prepared
) -> None:
    config = read_config(web.url)
    prepare(config)
    shard = prepared.manifest.train.shards[0].bin
    (web.folder / shard.name).write_bytes(bytes(shard.num_bytes))
    web.gate.clear()
    lock = mirror_folder(web.url) / f"{shard.name}.lock"
    with ThreadPoolExecutor(3) as threads:
        copies = [threads.submit(open_remote(web.url, config).copy, shard) for _ in range(3)]
        while not lock.exists() or count_waiting(lock) < 2:
            time.sleep(0.01)
        web.gate.set()
        failures = [copy.exception() for copy in copies]
    assert [str(failure).split(" ")[1:5] for failure in failures] == [
        ["does", "not", "match", "its"]
    ] * 3
    assert web.asked[shard.name] == 1
    shutil.copy(prepared.folder / shard.name, web.folder / shard.name)
    open_remote(web.url, config).copy(shard)  # an old failure is nobody's who did not wait for it


def test_a_copy_that_finds_no_room_names_disk_and_way_out_and_is_not_begun(
    web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    remote = open_remote(web.url, read_config(web.url))
    prepare(read_config(web.url))
    web.asked.clear()
    huge = FileRecord("train-00000.bin", 2**60, "0" * 64)
    said = (
        r"need 1,152,921,504,606,846,976 bytes more in .*/cache/.* whose disk \(/.*\) has .* free;"
    )
    with pytest.raises(ReadError, match=rf"{said}.*THRIFTY_CACHE.*data\.cache_bytes=") as told:
        retry(lambda: remote.copy(huge), HASTE, forget=remote.forget)
    assert is_lasting(told.value)
    assert web.asked["train-00000.bin"] == 0
    assert "attempt" not in caplog.text


def test_a_disk_that_is_full_in_the_midst_of_a_copy_is_named_and_not_tried_again(
    web: WebServer, prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_config(web.url)
    prepare(config)
    data = TrainingData(config, seed=4)
    for shard in prepared.manifest.train.shards:  # where the copy is written, all is full
        name = f"{shard.bin.name}.{os.uname().nodename}-{os.getpid()}.partial"
        (mirror_folder(web.url) / name).symlink_to("/dev/full")
    with pytest.raises(ReadError, match=r"bytes more in .*/cache/.*make room"):
        read(data)
    assert "attempt" not in caplog.text
    assert sum(web.asked[shard.bin.name] for shard in prepared.manifest.train.shards) == 1


def test_what_is_forbidden_is_not_asked_for_again(
    web: WebServer, prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_config(web.url)
    prepare(config)
    data = TrainingData(config, seed=4)
    web.wants = ("Authorization", "a ticket")
    with pytest.raises(ReadError, match=r"train-\d+\.bin"):
        read(data)
    assert "attempt" not in caplog.text


def test_what_lasts_is_told_from_what_may_pass() -> None:
    class ResponseError(Exception):  # as aiohttp's
        status = 403

    wrapped = OSError("a shard can't be read")
    wrapped.__cause__ = ResponseError()
    lasting = [PermissionError("AccessDenied"), OSError(errno.EROFS, "read-only"), wrapped]
    assert all(map(is_lasting, lasting))
    gone = FileNotFoundError(errno.ENOENT, "its mount may come back")
    passing = [gone, OSError("502"), TimeoutError()]
    assert not any(map(is_lasting, passing))


def test_a_complete_cache_is_read_where_no_lock_can_be_taken(
    web: WebServer, prepared: Prepared
) -> None:
    config = read_config(web.url)
    prepare(config)
    read(TrainingData(config, seed=4), 120)
    cache = mirror_folder(web.url)
    for path in cache.glob("*.lock"):  # what can't be opened for writing, for root either
        path.unlink()
        path.mkdir()
    prepare(config)
    read(TrainingData(config, seed=4), 120)
    (cache / prepared.manifest.train.shards[0].bin.name).unlink()
    with pytest.raises(ReadError, match=r"where copies from http.* are kept, can't be written"):
        read(TrainingData(config, seed=4), 120)


def test_a_process_asks_for_the_manifest_once(web: WebServer) -> None:
    config = read_config(web.url)
    corpora = open_corpora(config)
    bring_here(corpora)
    open_held_out(config, corpora=corpora)
    read(TrainingData(config, seed=4, corpora=corpora))
    assert web.asked[FILE] == 1
    prepare(config)
    assert web.asked[FILE] == 2


def test_damaged_copies_are_found_by_a_full_look_and_not_by_a_fast_one(
    web: WebServer, prepared: Prepared
) -> None:
    config = read_config(web.url)
    prepare(config)
    read(TrainingData(config, seed=4), 120)
    for shard in (prepared.manifest.train.shards[0], prepared.manifest.validation.shards[0]):
        path = mirror_folder(web.url) / shard.bin.name
        whole = path.read_bytes()
        path.write_bytes(bytes(len(whole)))
        TrainingData(read_config(web.url, verify=Verify.fast), seed=4)
        for look in (open_held_out, lambda config: TrainingData(config, seed=4)):
            with pytest.raises(ValueError, match=rf"{path} does not match its sha256.*delete it"):
                look(config)
        path.write_bytes(whole)


def test_a_shard_of_another_size_is_refused_by_a_node_that_never_read_it(
    web: WebServer, prepared: Prepared
) -> None:
    config = read_config(web.url, cache_bytes=0)
    for shard in prepared.manifest.train.shards:
        with (web.folder / shard.bin.name).open("ab") as file:
            file.write(b"more")
    with pytest.raises(OSError, match=r"train-\d+\.bin is longer than the corpus' manifest says"):
        read(TrainingData(config, seed=4))


def test_a_shard_that_one_node_knows_as_another_one_is_refused_by_all(
    web: WebServer, prepared: Prepared, tmp_path: Path
) -> None:
    config = read_config(web.url, cache_bytes=0)

    def start() -> str:
        ranks = connect(timeout_minutes=1)
        os.environ["THRIFTY_CACHE"] = str(tmp_path / f"disk of node {ranks.rank}")
        if ranks.rank == 1 and not web_changed.exists():
            read(TrainingData(config, seed=4), 120)
        try:
            agree_on_shards(open_corpora(config), ranks)
        except DataError as error:
            return str(error)
        return ""

    web_changed = tmp_path / "changed"
    assert run_ranks(2, start) == ["", ""]
    shutil.rmtree(tmp_path / "disk of node 0")  # a spare, say, in its place
    web_changed.touch()
    name = prepared.manifest.train.shards[0].bin.name
    (web.folder / name).write_bytes(bytes(prepared.manifest.train.shards[0].bin.num_bytes))
    first, second = run_ranks(2, start)
    assert first == second
    assert f"rank 1: {web.url}/{name} was replaced since it was first read" in first


def test_a_copy_is_made_in_parts_but_in_one_request_from_a_server_without_ranges(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "COPIED_AT_ONCE", 2**20)
    web.has_ranges = False
    config = read_config(web.url)
    prepare(config)
    content = bytes(range(256)) * 2**15  # more than fsspec reads at once
    (web.folder / "large.bin").write_bytes(content)
    record = FileRecord("large.bin", len(content), sha256(content).hexdigest())
    assert open_remote(web.url, config).copy(record).read_bytes() == content
    assert web.asked["large.bin"] == 1


def test_only_silence_counts_and_every_part_that_comes_is_noted() -> None:
    comes = threading.Event()

    def answer(arrived: object) -> str:
        assert callable(arrived)
        arrived()
        comes.set()
        return "whole"

    before = time.monotonic()
    assert within(60.0, answer, what="a file") == "whole"
    assert ARRIVALS.seconds_ago() <= time.monotonic() - before
    with pytest.raises(TimeoutError, match=r"a file has not answered within 0\.05 s"):
        within(0.05, lambda _: threading.Event().wait(60), what="a file")
    assert longest_silence(RetryConfig(), is_remote=True) == 5 * 60 + 15
    assert longest_silence(RetryConfig(), is_remote=False) == 15


@pytest.mark.slow
def test_an_answer_may_take_longer_than_the_silence_that_is_borne(
    web: WebServer, prepared: Prepared
) -> None:
    config = read_config(web.url, retry=RetryConfig(attempts=1, timeout_seconds=4.0))
    prepare(config)
    shard = max((s.bin for s in prepared.manifest.train.shards), key=lambda bin: bin.num_bytes)
    web.delay, web.piece = 0.8, shard.num_bytes // 7
    before = time.monotonic()
    open_remote(web.url, config).copy(shard)
    assert time.monotonic() - before > 4.5


def test_a_server_that_is_away_is_named_when_its_answer_names_nothing(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = open_remote(web.url, read_config(web.url))._file("train-00000.bin")
    for error in (TimeoutError("timed out"), TimeoutError(), FileNotFoundError("gone")):

        def fail(_: object, error: Exception = error) -> None:
            raise error

        with pytest.raises(ReadError, match=rf"{web.url}/train-00000\.bin: "):
            remote.ask(fail)
