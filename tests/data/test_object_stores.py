"""Corpora on real servers: a web server, and an S3 server where moto is installed (`slow`)."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

import data.token_stream
from data.blend import SourceConfig
from data.config import DataConfig, FilesData, MixtureData, read_alike
from data.fim import FimConfig
from data.held_out import open_held_out
from data.manifest import read_manifest, write_manifest
from data.mirror import mirror_folder
from data.mixture import Row
from data.position import Position
from data.prepare import Prepared, make_ready, prepare, tokenizer_path
from data.prepared_corpus import bring_here, open_corpora
from data.remote_file import MOST_BETWEEN, RemoteFile, RemoteTokens, fetch, open_url
from data.retry import RetryConfig
from data.rows import Rows
from data.samples import open_samples
from data.training_data import TrainingData
from tests.data.conftest import ConfigMaker
from tests.data.web_server import WebServer, hold_port, serve
from tests.ranks import run_ranks

HASTE = RetryConfig(attempts=2, wait_seconds=0.001)


class Store(Protocol):
    """Somewhere behind a URL."""

    url: str

    def put(self, name: str, content: bytes) -> None: ...

    def remove(self, name: str) -> None: ...

    def leave(self) -> None: ...

    def come_back(self) -> None: ...


class Web:
    def __init__(self, server: WebServer) -> None:
        self.server, self.url = server, server.url

    def put(self, name: str, content: bytes) -> None:
        (self.server.folder / name).write_bytes(content)

    def remove(self, name: str) -> None:
        (self.server.folder / name).unlink()

    def leave(self) -> None:
        self.server.stop()

    def come_back(self) -> None:
        self.server.start()


class S3:
    url = "s3://bucket/corpora/small"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        moto = pytest.importorskip("moto.server", reason="pip install 'thrifty[s3]'")
        self._serve = moto.ThreadedMotoServer
        self._place = hold_port()
        host, self._port = self._place.getsockname()
        self.come_back()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{self._port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import boto3
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # those of another server
        self._client = boto3.client("s3")
        self._client.create_bucket(Bucket="bucket")

    def put(self, name: str, content: bytes) -> None:
        self._client.put_object(Bucket="bucket", Key=f"corpora/small/{name}", Body=content)

    def remove(self, name: str) -> None:
        self._client.delete_object(Bucket="bucket", Key=f"corpora/small/{name}")

    def leave(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def come_back(self) -> None:
        self._server = self._serve(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()

    def close(self) -> None:
        self.leave()
        self._place.close()


@pytest.fixture(params=["http", pytest.param("s3", marks=pytest.mark.slow)])
def store(
    request: pytest.FixtureRequest,
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Any]:
    """The small corpus on a server of its own."""
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(prepared.folder, tmp_path / "served")
    if request.param == "http":
        with serve(folder) as server:
            yield Web(server)
        return
    s3 = S3(monkeypatch)
    for path in folder.iterdir():
        s3.put(path.name, path.read_bytes())
    yield s3
    s3.close()


@pytest.fixture
def web(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """The same, where only the web server's ways matter."""
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    with serve(shutil.copytree(prepared.folder, tmp_path / "served")) as server:
        yield server


def read_config(folder: str | Path, **fields: object) -> FilesData:
    values: dict[str, object] = {"paths": ["not looked at"], "seq_len": 40, "retry": HASTE}
    return FilesData(folder=str(folder), **values | fields)  # type: ignore[arg-type]


def read(data: TrainingData, count: int = 60, first: int = 0) -> list[Rows]:
    position = data.enter(Position())
    if first:
        position = data.draw(position, first).position
    return data.read(data.draw(position, count).rows, 5)


def is_same(one: list[Rows], other: list[Rows]) -> bool:
    return all(
        (a.tokens == b.tokens).all() and (a.targets == b.targets).all()
        for a, b in zip(one, other, strict=True)
    )


def copies(config: DataConfig, pattern: str = "train-*.bin") -> list[Path]:
    return sorted(mirror_folder(config.folder).glob(pattern))


def sizes(prepared: Prepared) -> list[int]:
    return [shard.bin.num_bytes for shard in prepared.manifest.train.shards]


def test_a_corpus_behind_a_url_is_trained_on_and_held_out_as_a_local_one(
    store: Store, prepared: Prepared
) -> None:
    bound = sum(sizes(prepared)) // 2
    config, local = read_config(store.url, cache_bytes=bound), read_config(prepared.folder)
    assert prepare(config).was_ready
    assert is_same(read(TrainingData(config, seed=4)), read(TrainingData(local, seed=4)))
    ours, theirs = open_samples(config), open_samples(local)
    assert ours.num_samples == theirs.num_samples > 2
    assert all((ours[k].tokens == theirs[k].tokens).all() for k in range(ours.num_samples))
    assert 0 < sum(path.stat().st_size for path in copies(config)) <= bound


def test_a_server_that_leaves_is_asked_again_then_named_and_read_on_from_once_it_is_back(
    store: Store, prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_config(store.url, cache_bytes=0)
    data = TrainingData(config, seed=4)
    read(data, 20)
    store.leave()
    with pytest.raises(OSError, match=r"corpora/small/train-\d+\.bin|:\d+/train-\d+\.bin"):
        read(data, 40, first=20)
    assert "attempt 1 of 2" in caplog.text
    store.come_back()
    expected = read(TrainingData(read_config(prepared.folder), seed=4), 40, first=20)
    assert is_same(read(data, 40, first=20), expected)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_shard_that_is_replaced_by_another_of_its_size_is_refused_by_the_next_start(
    store: Store, prepared: Prepared, is_kept: bool
) -> None:
    config = read_config(store.url, cache_bytes=2**30 * is_kept)
    prepare(config)
    if not is_kept:
        read(TrainingData(config, seed=4))  # takes note of what is there
    for shard in prepared.manifest.train.shards:
        store.put(shard.bin.name, bytes(shard.bin.num_bytes))
    wrong = "does not match its sha256" if is_kept else r"was replaced since it was first read"
    with pytest.raises(OSError, match=rf"train-\d+\.bin {wrong}"):
        read(TrainingData(config, seed=4))


def test_a_shard_that_became_too_short_is_refused_at_once(store: Store, prepared: Prepared) -> None:
    data = TrainingData(read_config(store.url, cache_bytes=0), seed=4)
    read(data, 20)
    for shard in prepared.manifest.train.shards:
        content = (prepared.folder / shard.bin.name).read_bytes()
        store.put(shard.bin.name, content[:50])
    fault = r"shorter than the corpus' manifest|Range Not Satisfiable|range is not satisfiable"
    with pytest.raises(OSError, match=rf"train-\d+\.bin.*({fault})"):
        read(data, 40, first=20)


def test_another_corpus_at_the_url_is_refused_by_the_next_start(
    store: Store, prepared: Prepared
) -> None:
    config = read_config(store.url)
    prepare(config)
    store.put("manifest.json", (prepared.folder / "manifest.json").read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"holds copies of another corpus .* delete the folder"):
        prepare(config)


def test_a_run_that_has_read_another_corpus_than_the_copies_are_refuses_them_without_the_server(
    web: WebServer, make_config: ConfigMaker, tmp_path: Path
) -> None:
    other = make_config(tmp_path / "other", validation_fraction=0.5, seq_len=40)
    prepare(other)
    position = TrainingData(other, seed=4).enter(Position())
    config = read_config(web.url)
    prepare(config)
    web.stop()
    with pytest.raises(ValueError, match=r"is another corpus than the one this run has read"):
        TrainingData(config, seed=4).enter(position)


def test_a_manifest_that_is_gone_is_missed_only_where_there_is_no_copy(
    store: Store, prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_config(store.url)
    prepare(config)
    store.remove("manifest.json")
    assert prepare(config).manifest == prepared.manifest
    assert f"manifest.json is gone; its local copies in {mirror_folder(store.url)}" in caplog.text
    shutil.rmtree(mirror_folder(store.url))
    with pytest.raises(ValueError, match=r"holds no finished corpus .* copy all of that"):
        prepare(config)


def test_a_corpus_that_only_points_to_its_shards_is_refused(
    web: WebServer, prepared: Prepared, tmp_path: Path
) -> None:
    train = prepared.manifest.train
    shards = [replace(shard, name=f"/elsewhere/{shard.name}") for shard in train.shards]
    pointing = replace(prepared.manifest, train=replace(train, shards=shards))
    write_manifest(web.folder, pointing)
    with pytest.raises(ValueError, match=r"only points to its shards, such as /elsewhere/train-0"):
        prepare(read_config(web.url))


def test_a_run_starts_from_its_copies_while_the_server_is_away(
    store: Store, prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_config(store.url)
    prepare(config)  # as every start does
    expected = read(TrainingData(config, seed=4))
    store.leave()
    assert prepare(config).manifest == prepared.manifest
    assert is_same(read(TrainingData(config, seed=4)), expected)
    assert open_samples(config).num_samples > 2
    assert f"its local copies in {mirror_folder(store.url)} are read instead" in caplog.text
    copies(config)[0].unlink()
    with pytest.raises(OSError, match=r"train-00000\.bin"):
        read(TrainingData(config, seed=4))
    store.come_back()


def test_without_copies_a_server_that_is_away_is_named(store: Store) -> None:
    store.leave()
    with pytest.raises(OSError, match=r"manifest\.json"):
        prepare(read_config(store.url))
    store.come_back()


def test_processes_of_a_node_copy_each_file_once(web: WebServer, prepared: Prepared) -> None:
    def read_all() -> int:
        config = read_config(web.url)
        bring_here(open_corpora(config))
        open_samples(config)
        return len(read(TrainingData(config, seed=4)))

    web.delay = 0.02  # long enough for the others to come and ask for the same
    assert run_ranks(3, read_all) == [12] * 3
    copied = {path.name: path.stat().st_size for path in copies(read_config(web.url), "*.*")}
    for name in (*(shard.bin.name for shard in prepared.manifest.train.shards), "tokenizer.model"):
        assert web.sent[name] == copied[name] == (prepared.folder / name).stat().st_size


def test_only_what_is_read_of_a_corpus_is_copied(web: WebServer, prepared: Prepared) -> None:
    config = read_config(web.url)
    assert tokenizer_path(config).read_bytes() == (prepared.folder / "tokenizer.model").read_bytes()
    assert web.asked.keys() == {"manifest.json", "tokenizer.model"}
    assert len(prepared.manifest.validation.shards) > 1
    open_samples(config)[0]
    first = prepared.manifest.validation.shards[0]
    assert {name for name in web.asked if "validation" in name} == {first.bin.name, first.idx.name}
    mixture = MixtureData(
        sources=[
            SourceConfig(name="near", folder=str(prepared.folder), weight=1),
            SourceConfig(name="far", folder="http://127.0.0.1:9/none", weight=1),
        ]
    )
    assert tokenizer_path(mixture) == prepared.folder / "tokenizer.model"


def test_a_server_that_does_not_answer_is_given_up(web: WebServer) -> None:
    patience = RetryConfig(attempts=2, wait_seconds=0.001, timeout_seconds=0.1)
    web.delay = 0.5
    with pytest.raises(OSError, match=r"manifest\.json has not answered within 0\.1 s"):
        prepare(read_config(web.url, retry=patience))


def test_an_answer_that_breaks_off_is_no_copy(web: WebServer, prepared: Prepared) -> None:
    config = read_config(web.url)
    prepare(config)
    web.cuts_after = 100
    with pytest.raises(OSError, match=r"train-\d+\.bin"):
        read(TrainingData(config, seed=4))
    assert copies(config) == []
    web.cuts_after = None
    expected = read(TrainingData(read_config(prepared.folder), seed=4))
    assert is_same(read(TrainingData(config, seed=4)), expected)


@pytest.mark.parametrize(("rate", "most"), [(0.0, 1), (1.0, 2)])
def test_a_step_asks_once_for_all_its_ranges_however_many_shards_and_rearranged_documents_it_has(
    web: WebServer,
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
    most: int,
) -> None:
    monkeypatch.setattr(data.token_stream, "OPEN_SHARDS", 1)  # of more than two
    fields: dict[str, object] = {"fim": FimConfig(rate=rate), "seq_len": 200}
    train = TrainingData(read_config(web.url, cache_bytes=0, **fields), seed=4)
    read(train, 40)  # what a file's ETag is, is asked when it is first read
    rows = train.draw(train.draw(train.enter(Position()), 40).position, 40).rows
    pieces = {(piece.place, piece.offset) for row in rows for piece in row.pieces}
    before, requests = web.asked.total(), 0
    ask = RemoteFile.ask

    def counted(file: RemoteFile, request: Any) -> Any:
        nonlocal requests
        requests += 1
        return ask(file, request)

    monkeypatch.setattr(RemoteFile, "ask", counted)
    expected = TrainingData(read_config(prepared.folder, **fields), seed=4).read(rows, 5)
    assert is_same(train.read(rows, 5), expected)
    assert 1 <= requests <= most
    assert web.asked.total() - before <= len(pieces)  # near ranges are joined


def test_a_rearranged_document_at_the_end_of_the_last_shard_is_read_to_its_end(
    web: WebServer, prepared: Prepared
) -> None:
    # Three tokens more than are stored, in rows of three: one row begins past what is stored.
    fields: dict[str, object] = {"fim": FimConfig(rate=1.0), "seq_len": 3}
    afar = TrainingData(read_config(web.url, cache_bytes=0, **fields), seed=4)
    near = TrainingData(read_config(prepared.folder, **fields), seed=4)
    drawn = near.draw(near.enter(Position()), read_manifest(prepared.folder).train.tokens // 3).rows

    def last_start(row: Row) -> int:
        return max(int(row.documents.starts[p.place - row.window.start]) for p in row.pieces)

    last = max(map(last_start, drawn))
    rows = [row for row in drawn if last_start(row) == last]
    assert is_same(afar.read(rows, len(rows)), near.read(rows, len(rows)))


def test_an_error_tells_no_signature_of_a_url_to_which_a_server_led_on(web: WebServer) -> None:
    def fail(_: object) -> None:
        raise OSError(f"403, message='Forbidden', url='{web.url}/a.bin?X-Amz-Signature=SECRET'")

    with pytest.raises(OSError, match="Forbidden") as caught:
        open_url(f"{web.url}/manifest.json", timeout=10).ask(fail)
    assert "/a.bin'" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_ranges_that_were_fetched_are_found_whichever_of_them_came_first(web: WebServer) -> None:
    tokens = np.arange(200_000, dtype=np.uint16)
    (web.folder / "tokens.bin").write_bytes(tokens.tobytes())
    remote = RemoteTokens(open_url(f"{web.url}/tokens.bin", timeout=10), tokens.dtype)
    far = MOST_BETWEEN // tokens.itemsize + 1
    for ranges, num_requests in [
        ([(50, 60), (20, 30), (25, 40), (70 + far, 80 + far)], 2),
        ([(22, 58), (71 + far, 72 + far)], 0),  # all are there, one in a gap that was filled
        ([(10, 25), (5, 200_000)], 1),  # around all that is there
        ([(1000, 1001), (150_000, 199_999)], 0),
    ]:
        before = web.asked.total()
        fetch((remote, start, stop) for start, stop in ranges)
        assert all((remote[a:b] == tokens[a:b]).all() for a, b in ranges)
        assert web.asked.total() - before == num_requests
    remote.drop()
    before = web.asked.total()
    assert remote[7:9].tolist() == [7, 8]
    assert web.asked.total() == before + 1


def test_a_server_without_ranges_is_read_where_all_is_copied_and_else_refused(
    web: WebServer, prepared: Prepared
) -> None:
    web.has_ranges = False
    config = read_config(web.url, cache_bytes=0)
    with pytest.raises(OSError, match=r"sends the whole file .* raise data\.cache_bytes"):
        read(TrainingData(config, seed=4))
    expected = read(TrainingData(read_config(prepared.folder), seed=4))
    assert is_same(read(TrainingData(read_config(web.url), seed=4)), expected)


def test_a_url_without_a_corpus_says_how_one_gets_there(web: WebServer) -> None:
    with pytest.raises(ValueError, match=r"/nothing holds no finished corpus .* copy all of that"):
        prepare(read_config(f"{web.url}/nothing"))


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ValueError, match=r"nosuch://b/c can't be read: .*nosuch"):
        prepare(read_config("nosuch://b/c"))


def test_another_corpus_is_read_alike_without_the_mixtures_sources(web: WebServer) -> None:
    sources = [SourceConfig(name="gone", folder="http://127.0.0.1:9/none", weight=1)]
    mixture = MixtureData(sources=sources, seq_len=40, retry=HASTE)
    assert open_samples(read_alike(mixture, web.url)).num_samples > 2


def test_nodes_may_keep_a_mixtures_copies_in_different_places(
    web: WebServer, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        SourceConfig(name="far", folder=web.url, weight=1),
        SourceConfig(name="near", folder=str(prepared.folder), weight=1),
    ]
    config = MixtureData(sources=sources, seq_len=40, retry=HASTE)
    make_ready(config)
    here = open_held_out(config)
    (tmp_path / "cache").rename(tmp_path / "unmounted")  # that was the first node's disk
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "elsewhere"))
    there = open_held_out(config)
    assert there.fingerprint == here.fingerprint
    assert there.samples.num_samples > open_samples(read_config(web.url)).num_samples
    is_read = (there.samples[k].tokens.size for k in range(there.samples.num_samples))
    assert sum(is_read) == 40 * there.samples.num_samples
    assert not (tmp_path / "cache").exists()
