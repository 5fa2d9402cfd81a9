"""Damage of every kind of file, in both modes, and disks that are full or closed."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint.checkpoints import Checkpoints, SaveError, load
from train.checkpoint.integrity import CheckpointVerify, verify_files
from train.checkpoint.manifest import MANIFEST_FILE, Fragment, read_manifest, write_manifest
from train.ranks import alone

FAST, FULL = CheckpointVerify.fast, CheckpointVerify.full
FILES = ("rank-00000.safetensors", "ema-00000.safetensors", MANIFEST_FILE)


def about(seed: int = 0) -> dict[str, Any]:
    rest = {"progress": {}, "tokenizer": "abc", "layout": {}, "versions": {}}
    return {**rest, "config": {"seed": seed, "run_dir": "anywhere"}}


def fragments(value: float = 1.0) -> list[Fragment]:
    return [
        Fragment(f"{kind}/a", (3000,), 0, torch.full((3000,), value)) for kind in ("weight", "ema")
    ]


def two_checkpoints(folder: Path, *, seed: int = 0, value: float = 1.0) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=5)
    for step in (1, 2):
        checkpoints.save(step, fragments(step * value), ranks=alone(), about=about(seed))
    return checkpoints


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return two_checkpoints(tmp_path / "run")


def flip(path: Path, place: int, *, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def newest(checkpoints: Checkpoints, verify: CheckpointVerify) -> int:
    checkpoints.verify = verify
    manifest = checkpoints.find_newest(alone())
    assert manifest is not None
    return manifest.step


@pytest.mark.parametrize("verify", CheckpointVerify)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "gone", "its first bytes flip", "grown"])
def test_a_damaged_file_of_any_kind_is_named_in_either_mode(
    checkpoints: Checkpoints,
    caplog: pytest.LogCaptureFixture,
    verify: CheckpointVerify,
    file: str,
    damage: str,
) -> None:
    path = checkpoints.path(2) / file
    match damage:
        case "cut":
            os.truncate(path, path.stat().st_size - 1 - path.stat().st_size // 2)
        case "gone":
            path.unlink()
        case "its first bytes flip":
            for place in (0, 4, 12):
                flip(path, place)
        case "grown":
            with path.open("ab") as stream:
                stream.write(b"x" * 8)
    assert newest(checkpoints, verify) == 1
    assert file in caplog.text
    assert "going back to the checkpoint before it" in caplog.text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_one_bit_that_flips_anywhere_in_any_file_is_found(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture, file: str, share: float, bit: int
) -> None:
    path = checkpoints.path(2) / file
    flip(path, int(share * (path.stat().st_size - 1)), bit=bit)
    assert newest(checkpoints, FULL) == 1
    assert file in caplog.text


@pytest.mark.parametrize("file", FILES[:2])
def test_only_the_full_mode_reads_every_byte(checkpoints: Checkpoints, file: str) -> None:
    flip(checkpoints.path(2) / file, -100)
    assert newest(checkpoints, FAST) == 2, "the fast mode reads no values, as its comment says"
    assert newest(checkpoints, FULL) == 1


@pytest.mark.parametrize("verify", CheckpointVerify)
def test_a_file_of_another_run_or_step_is_not_taken_for_this_ones(
    checkpoints: Checkpoints, tmp_path: Path, verify: CheckpointVerify
) -> None:
    other = two_checkpoints(tmp_path / "other", seed=1, value=3.0)
    for source in (other.path(2), checkpoints.path(1)):
        shutil.copy(source / FILES[0], checkpoints.path(2) / FILES[0])
        assert newest(checkpoints, verify) == 1


def test_the_same_run_elsewhere_writes_the_same_bytes(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    again = two_checkpoints(tmp_path / "again")
    for file in FILES[:2]:
        assert (again.path(2) / file).read_bytes() == (checkpoints.path(2) / file).read_bytes()


def test_a_stray_tensor_file_is_named(checkpoints: Checkpoints) -> None:
    shutil.copy(checkpoints.path(2) / FILES[0], checkpoints.path(2) / "rank-00007.safetensors")
    with pytest.raises(ValueError, match=r"holds rank-00007.safetensors, which this checkpoint"):
        verify_files(checkpoints.path(2), read_manifest(checkpoints.path(2)))


@pytest.mark.parametrize(
    "key", ["step", "tokens", "config", "files", "parent", "progress", "format"]
)
def test_an_edited_manifest_is_refused(checkpoints: Checkpoints, key: str) -> None:
    path = checkpoints.path(2) / MANIFEST_FILE
    values = json.loads(path.read_text())
    values[key] = {"edited": 1} if isinstance(values[key], dict) else 77
    if key == "format":
        values[key] = 1  # which had no hash
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"manifest.json (has been edited or damaged|is no)"):
        read_manifest(checkpoints.path(2))


def test_white_space_in_a_manifest_is_no_edit(checkpoints: Checkpoints) -> None:
    path = checkpoints.path(2) / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert read_manifest(checkpoints.path(2)).step == 2


def test_a_checkpoint_of_format_1_is_read(checkpoints: Checkpoints) -> None:
    """As version 0.1 wrote it: no hash of itself, none of headers, none of the new keys."""
    folder = checkpoints.path(2)
    values = json.loads((folder / MANIFEST_FILE).read_text())
    old = ("step", "progress", "tokenizer", "layout", "versions", "config", "tensors", "files")
    kept = {"format": 1} | {key: values[key] for key in old}
    kept["files"] = {name: stored[:2] for name, stored in kept["files"].items()}
    (folder / MANIFEST_FILE).write_text(json.dumps(kept))
    assert newest(checkpoints, FULL) == 2
    data = torch.zeros(3000)
    load(folder, read_manifest(folder), [Fragment("weight/a", (3000,), 0, data)])
    assert data.eq(2.0).all()
    flip(folder / FILES[0], -100)
    assert newest(checkpoints, FULL) == 1


def test_every_field_of_a_manifest_survives_the_file(checkpoints: Checkpoints) -> None:
    manifest = read_manifest(checkpoints.path(2))
    write_manifest(checkpoints.path(2), manifest)
    assert read_manifest(checkpoints.path(2)) == manifest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_at_any_stage_leaves_the_last_checkpoint_and_nothing_else(
    small_disk: Path,
) -> None:
    """From no page free to enough: folders, headers, values, the manifest each fail in turn."""
    checkpoints = Checkpoints(small_disk, keep=5)
    checkpoints.save(1, fragments(), ranks=alone(), about=about())
    filler, page = small_disk / "filler", os.sysconf("SC_PAGE_SIZE")
    reasons, outcomes = set(), []
    for pages in range(14):
        free = os.statvfs(small_disk).f_bavail * page
        filler.write_bytes(b"\0" * (free - pages * page))
        try:
            checkpoints.save(2, fragments(), ranks=alone(), about=about())
            outcomes.append(True)
        except SaveError as error:
            reasons.add(str(error).split(": ", 1)[1].split("]")[0])
            outcomes.append(False)
        expected = [1, 2] if outcomes[-1] else [1]
        assert checkpoints.steps() == expected
        assert len(list(checkpoints.folder.iterdir())) == len(expected)
        for step in expected:
            verify_files(checkpoints.path(step), read_manifest(checkpoints.path(step)))
        shutil.rmtree(checkpoints.path(2), ignore_errors=True)
        filler.unlink()
    assert outcomes == sorted(outcomes), "with more room a save fails that had succeeded with less"
    assert not outcomes[0]
    assert outcomes[-1]
    assert reasons == {"rank 0: [Errno 28"}


def test_a_disk_without_a_file_to_spare_refuses_at_every_stage(small_disk: Path) -> None:
    """Folder, two tensor files and the manifest need one inode each."""
    checkpoints = Checkpoints(small_disk, keep=5)
    checkpoints.save(1, fragments(), ranks=alone(), about=about())
    for spare in range(5):
        fillers = [small_disk / f"filler-{i}" for i in range(os.statvfs(small_disk).f_favail)]
        for filler in fillers[spare:]:
            filler.touch()
        if spare < 4:
            with pytest.raises(SaveError, match="No space left on device"):
                checkpoints.save(2, fragments(), ranks=alone(), about=about())
            assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]
        else:
            checkpoints.save(2, fragments(), ranks=alone(), about=about())
        for filler in fillers[spare:]:
            filler.unlink()
    assert checkpoints.steps() == [1, 2]


def test_a_read_only_disk_is_named_and_what_is_there_still_loads(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk, keep=1)
    checkpoints.save(1, fragments(), ranks=alone(), about=about())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SaveError, match="Read-only file system"):
        checkpoints.save(2, fragments(), ranks=alone(), about=about())
    assert newest(checkpoints, FULL) == 1
