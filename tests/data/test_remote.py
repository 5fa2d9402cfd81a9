"""A source behind a URL is read as if it were local, within a bound of disk, or says why not."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import fsspec
import pytest

from data.atomic_file import write_aside
from data.blend import SourceConfig
from data.config import MixtureData, check_data
from data.fim import FimConfig
from data.manifest import FileRecord
from data.mirror import mirror_folder
from data.position import Position
from data.prepare import Prepared, make_ready
from data.remote import open_remote
from data.retry import RetryConfig
from data.rows import Rows
from data.training_data import TrainingData


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, prepared: Prepared, tmp_path: Path) -> str:
    """The small corpus, copied to another file system."""
    url = f"{request.param}://{tmp_path}/bucket/corpus"
    files, root = fsspec.url_to_fs(url)
    files.makedirs(root, exist_ok=True)
    for path in prepared.folder.iterdir():
        if path.is_file():
            files.pipe_file(f"{root}/{path.name}", path.read_bytes())
    return url


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))


def mixture(folder: Path, source: str, **fields: object) -> MixtureData:
    sources = [SourceConfig(name="a", folder=source, weight=1)]
    values: dict[str, object] = {"seq_len": 40, "fim": FimConfig(rate=0.2)}
    return MixtureData(sources=sources, **({"folder": str(folder)} | values | fields))  # type: ignore[arg-type]


def read(config: MixtureData, count: int = 60) -> list[Rows]:
    data = TrainingData(config, seed=4)
    return data.read(data.draw(data.enter(Position()), count).rows, 5)


def kept(tmp_path: Path) -> list[int]:
    return sorted(path.stat().st_size for path in (tmp_path / "cache").glob("*/train-*.bin"))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_remote_source_reads_as_a_local_one_and_keeps_to_the_bound(
    url: str, prepared: Prepared, tmp_path: Path, share: float
) -> None:
    sizes = [shard.bin.num_bytes for shard in prepared.manifest.train.shards]
    assert len(sizes) > 2
    config = mixture(tmp_path / "mixture", url, cache_bytes=int(share * sum(sizes)))
    make_ready(config)
    local = mixture(tmp_path / "local", str(prepared.folder))
    for got, expected in zip(read(config), read(local), strict=True):
        assert (got.tokens == expected.tokens).all()
        assert (got.targets == expected.targets).all()
        assert got.document_lengths == expected.document_lengths
    assert sum(kept(tmp_path)) <= config.cache_bytes
    assert bool(kept(tmp_path)) == (share > 0)
    assert share < 1 or len(kept(tmp_path)) == len(sizes)


def test_a_remote_shard_that_vanishes_is_tried_again_and_then_named(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patience = RetryConfig(attempts=2, wait_seconds=0.001)
    config = mixture(tmp_path / "mixture", url, cache_bytes=0, retry=patience)
    make_ready(config)
    files, root = fsspec.url_to_fs(url)
    for path in files.glob(f"{root}/train-*.bin"):
        files.rm(path)
    with pytest.raises(OSError, match=r"train-0000\d\.bin"):
        read(config)
    assert "attempt 1 of 2" in caplog.text


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_fault_beside_remote_shards_is_named_and_not_their_missing_copies(
    url: str, prepared: Prepared, tmp_path: Path, rate: float
) -> None:
    near = shutil.copytree(prepared.folder, tmp_path / "near")
    patience = RetryConfig(attempts=2, wait_seconds=0)  # the second opens the shards once more
    config = mixture(
        tmp_path / "mixture", url, cache_bytes=0, retry=patience, fim=FimConfig(rate=rate)
    )
    config.sources.append(SourceConfig(name="b", folder=str(near), weight=1))
    make_ready(config)
    data = TrainingData(config, seed=4)
    rows = data.draw(data.enter(Position()), 60).rows
    data.read(rows, 60)
    for path in near.glob("train-*.bin"):
        os.truncate(path, 0)
    with pytest.raises(OSError, match=r"near/train-0000\d\.bin has 0 bytes"):
        data.read(rows, 60)


def test_a_copy_that_is_not_what_was_prepared_is_refused(url: str, tmp_path: Path) -> None:
    patience = RetryConfig(attempts=2, wait_seconds=0.001)
    config = mixture(tmp_path / "mixture", url, retry=patience)
    make_ready(config)
    files, root = fsspec.url_to_fs(url)
    content = files.cat_file(f"{root}/train-00000.bin")
    files.pipe_file(f"{root}/train-00000.bin", bytes(2) + content[2:])
    with pytest.raises(OSError, match=r"train-00000\.bin does not match its sha256"):
        read(config)


@pytest.mark.parametrize(
    ("method", "cache_bytes", "is_returned"),
    [("cat_ranges", 0, False), ("cat_ranges", 0, True), ("open", 2**30, False)],
)
def test_a_clients_own_error_is_one_that_a_run_is_saved_at(
    url: str, tmp_path: Path, method: str, cache_bytes: int, is_returned: bool
) -> None:
    """aiohttp's errors are no OSErrors; old versions of fsspec return them among the ranges."""

    class ClientError(Exception):
        pass

    error = ClientError("502, bad gateway")

    def fail(self: object, paths: list[str], *args: object, **kwargs: object) -> list[ClientError]:
        if is_returned:
            return [error] * len(paths)
        raise error

    config = mixture(tmp_path / "mixture", url, cache_bytes=cache_bytes)
    config.retry = RetryConfig(attempts=2, wait_seconds=0.001)
    make_ready(config)
    files, _ = fsspec.url_to_fs(url)
    with (
        mock.patch.object(type(files), method, fail),
        pytest.raises(OSError, match="502, bad gateway"),
    ):
        read(config)


def test_ranks_that_copy_a_file_at_once_do_not_take_it_from_each_other(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    with write_aside(path, alone=False) as one, mock.patch("os.getpid", return_value=-1):
        one.write(b"half, ")
        with write_aside(path, alone=False) as other:
            other.write(b"half, whole")
        assert path.read_bytes() == b"half, whole"
        one.write(b"whole")
    assert path.read_bytes() == b"half, whole"
    assert list(tmp_path.iterdir()) == [path]


def test_copies_that_were_cut_off_are_removed_but_not_one_that_is_being_made(
    url: str, tmp_path: Path
) -> None:
    folder = mirror_folder(url)
    folder.mkdir(parents=True)
    left, made = folder / "train-00000.bin.a-1.partial", folder / "train-00000.bin.a-2.partial"
    left.touch()
    made.touch()
    os.utime(left, (0, 0))
    make_ready(mixture(tmp_path / "mixture", url))
    assert not left.exists()
    assert made.exists()


def test_another_corpus_behind_the_url_is_not_mixed_with_the_copies_of_the_first(
    url: str, tmp_path: Path
) -> None:
    config = mixture(tmp_path / "mixture", url)
    make_ready(config)
    files, root = fsspec.url_to_fs(url)
    files.pipe_file(f"{root}/manifest.json", files.cat_file(f"{root}/manifest.json") + b"\n")
    with pytest.raises(ValueError, match=r"cache/corpus-.* holds copies of another .* delete the"):
        read(config)


def test_a_corpus_is_not_made_behind_a_url(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.folder=s3://b/c is a URL, .* in data\.sources"):
        check_data(replace(mixture(tmp_path, str(tmp_path)), folder="s3://b/c"))


@pytest.mark.parametrize("name", ["../evil", "sub/evil", "..", "/tmp/thrifty-evil"])
def test_a_manifest_cannot_have_a_file_written_outside_the_copys_folder(
    url: str, tmp_path: Path, name: str
) -> None:
    remote = open_remote(url, mixture(tmp_path / "mixture", url))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="lies outside its folder"):
        remote.copy(FileRecord(name, 1, "0" * 64))
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/thrifty-evil.lock").exists()
