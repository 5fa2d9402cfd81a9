"""A checkpoint's files: layout-free, checked, atomic."""

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train.checkpoint.checkpoints import (
    CheckpointConfig,
    Checkpoints,
    SaveError,
    check_checkpoint,
    load,
)
from train.checkpoint.coverage import check_coverage
from train.checkpoint.integrity import verify_files
from train.checkpoint.manifest import (
    MANIFEST_FILE,
    Fragment,
    Part,
    Piece,
    StoredFile,
    StoredTensor,
    merge_runs,
    read_manifest,
)
from train.checkpoint.tensor_file import hash_tensors, write_tensors
from train.ranks import alone

ABOUT: dict[str, Any] = {
    "progress": {"step": 1},
    "tokenizer": "abc",
    "layout": {},
    "versions": {},
    "config": {},
}


def fragments(scale: float = 1.0) -> list[Fragment]:
    weight = torch.arange(12.0) * scale
    return [
        Fragment("weight/a", (3, 4), 0, weight[:5]),
        Fragment("weight/a", (3, 4), 5, weight[5:]),
        Fragment("buffer/b", (2,), 0, torch.tensor([1, 2])),
    ]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, fragments(), ranks=alone(), about=ABOUT)
    return checkpoints


def test_any_cut_of_a_tensor_reads_what_another_cut_wrote(checkpoints: Checkpoints) -> None:
    folder = checkpoints.path(1)
    manifest = read_manifest(folder)
    for start, stop in [(0, 12), (0, 5), (3, 7), (5, 12), (11, 12)]:
        data = torch.full((stop - start,), -1.0)
        load(folder, manifest, [Fragment("weight/a", (3, 4), start, data)])
        assert data.tolist() == list(range(start, stop))


def test_files_are_plain_safetensors(checkpoints: Checkpoints) -> None:
    tensors = load_file(checkpoints.path(1) / "rank-00000.safetensors")
    assert tensors["weight/a@5"].tolist() == list(range(5, 12))
    assert tensors["buffer/b@0"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_every_dtype_survives_the_file_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 100, (1000,)).to(dtype)
    written = write_tensors(tmp_path / "f", {"x": tensor, "empty": tensor[:0]})
    assert torch.equal(load_file(tmp_path / "f")["x"], tensor)
    assert written == hash_tensors(tmp_path / "f")


def test_only_the_newest_are_kept_and_in_order(checkpoints: Checkpoints) -> None:
    for step in (2, 3):
        checkpoints.save(step, fragments(), ranks=alone(), about=ABOUT)
    assert checkpoints.steps() == [2, 3]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit flips": (lambda path: flip_a_bit(path / "rank-00000.safetensors"), "has changed"),
    "a file is cut": (
        lambda path: os.truncate(path / "rank-00000.safetensors", 100),
        "has 100 bytes instead of",
    ),
    "a file is gone": (lambda path: (path / "rank-00000.safetensors").unlink(), "is missing"),
    "the manifest is cut": (lambda path: os.truncate(path / MANIFEST_FILE, 50), MANIFEST_FILE),
    "the manifest is gone": (lambda path: (path / MANIFEST_FILE).unlink(), MANIFEST_FILE),
    "the manifest lacks a key": (
        lambda path: (path / MANIFEST_FILE).write_text(json.dumps({"format": 1})),
        MANIFEST_FILE,
    ),
    "the format is of the future": (
        lambda path: (path / MANIFEST_FILE).write_text(json.dumps({"format": 99})),
        "format 99, this version reads 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checkpoints.save(2, fragments(2.0), ranks=alone(), about=ABOUT)
    hurt, message = DAMAGES[damage]
    hurt(checkpoints.path(2))
    newest = checkpoints.find_newest(alone())
    assert newest is not None
    assert newest.step == 1
    assert "checkpoint of step 2 is damaged" in caplog.text
    assert message in caplog.text


def test_with_no_whole_checkpoint_left_the_run_does_not_start_over(
    checkpoints: Checkpoints,
) -> None:
    flip_a_bit(checkpoints.path(1) / "rank-00000.safetensors")
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        checkpoints.find_newest(alone())


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, keep=1).find_newest(alone()) is None


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    checkpoints: Checkpoints,
) -> None:
    """The kernel refuses to let a file grow past a limit: a real failed write, without root."""
    large = [Fragment("weight/a", (100_000,), 0, torch.ones(100_000))]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(SaveError, match="step 2 .* could not be written: rank 0: .*File too"):
            checkpoints.save(2, large, ranks=alone(), about=ABOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]
    verify_files(checkpoints.path(1), read_manifest(checkpoints.path(1)))


def test_coverage_is_checked_both_ways(checkpoints: Checkpoints) -> None:
    manifest = read_manifest(checkpoints.path(1))
    whole: dict[str, tuple[int, ...]] = {"weight/a": (3, 4), "buffer/b": (2,)}
    check_coverage(manifest, whole)
    with pytest.raises(ValueError, match="lacks weight/c"):
        check_coverage(manifest, whole | {"weight/c": (1,)})
    with pytest.raises(ValueError, match="has buffer/b, which this model lacks"):
        check_coverage(manifest, {"weight/a": (3, 4), "buffer/c": (2,)})
    with pytest.raises(ValueError, match=r"weight/a has shape \[3, 4\] .* but \[4, 3\]"):
        check_coverage(manifest, whole | {"weight/a": (4, 3)})


def test_a_tensor_that_is_missing_or_surplus_passes_only_if_it_is_named(
    checkpoints: Checkpoints,
) -> None:
    manifest = read_manifest(checkpoints.path(1))
    wanted: dict[str, tuple[int, ...]] = {"weight/a": (3, 4), "buffer/c": (2,)}
    named = {"allow_missing": ["buffer/[cd]"], "allow_surplus": ["buffer/b"]}
    assert check_coverage(manifest, wanted, **named) == ["buffer/c"]
    for key in named:
        other = {name: patterns for name, patterns in named.items() if name != key}
        with pytest.raises(ValueError, match=f"name it in checkpoint.{key}"):
            check_coverage(manifest, wanted, **other)
        with pytest.raises(ValueError, match=f"name it in checkpoint.{key}"):
            check_coverage(manifest, wanted, **{**named, key: ["weight/*"]})


def test_a_hole_between_owners_is_a_defect_that_stops_the_save() -> None:
    def part(start: int, numel: int) -> Part:
        run = StoredTensor((10,), "float32", [Piece("f", start, numel)])
        return Part("f", StoredFile(0, ""), [("weight/a", run)])

    with pytest.raises(AssertionError, match="elements 4 to 6 have no owner"):
        merge_runs([part(0, 4), part(6, 4)])
    with pytest.raises(AssertionError, match="elements from 9 on"):
        merge_runs([part(0, 4), part(4, 5)])


@pytest.mark.parametrize("key", ["every", "keep"])
def test_intervals_must_be_positive(key: str) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.{key}=0"):
        check_checkpoint(CheckpointConfig(**{key: 0}))
