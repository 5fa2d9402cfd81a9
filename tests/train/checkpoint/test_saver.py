"""Saving beside training: what a step waits for, and what it never sees."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import train.checkpoint.checkpoints
from tests.ranks import run_ranks
from train.checkpoint.checkpoints import Checkpoints, SaveError, load
from train.checkpoint.manifest import Fragment, read_manifest
from train.checkpoint.saver import Saver
from train.checkpoint.snapshot import ALIGNMENT, Snapshot
from train.ranks import alone, connect

ABOUT: dict[str, Any] = {
    "progress": {},
    "tokenizer": "",
    "layout": {},
    "versions": {},
    "config": {},
}


def state(numel: int = 1000) -> list[Fragment]:
    return [
        Fragment("weight/a", (numel,), 0, torch.arange(float(numel))),
        Fragment("buffer/b", (3,), 0, torch.tensor([1, 2, 3])),
    ]


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """Writers wait for the event."""
    real, may_write = train.checkpoint.checkpoints.write_tensors, threading.Event()

    def write(*args: Any, **kwargs: Any) -> Any:
        assert may_write.wait(30)
        return real(*args, **kwargs)

    with mock.patch.object(train.checkpoint.checkpoints, "write_tensors", write):
        yield may_write


def test_training_goes_on_while_the_state_of_before_is_written(tmp_path: Path) -> None:
    checkpoints, fragments = Checkpoints(tmp_path), state()
    saver = Saver(checkpoints, alone(), snapshot=Snapshot(fragments))
    with held_back() as may_write:
        saver.start(1, fragments, ABOUT)
        assert saver.step == 1
        assert not saver.has_ended()
        fragments[0].data.fill_(-1.0)
        assert checkpoints.steps() == [], "what is not finished is taken for a checkpoint"
        assert checkpoints.find_newest(alone()) is None
        may_write.set()
        saved = saver.finish()
    assert (saved.written.step, saver.step) == (1, None)
    got = torch.empty(1000)
    manifest = read_manifest(checkpoints.path(1))
    load(checkpoints.path(1), manifest, [Fragment("weight/a", (1000,), 0, got)])
    assert torch.equal(got, torch.arange(1000.0))
    assert saved.written.hash == manifest.hash


def test_one_save_at_a_time(tmp_path: Path) -> None:
    saver = Saver(Checkpoints(tmp_path), alone(), snapshot=Snapshot(state()))
    with held_back() as may_write:
        saver.start(1, state(), ABOUT)
        with pytest.raises(AssertionError, match="the save before it must be finished"):
            saver.start(2, state(), ABOUT)
        may_write.set()
        saver.finish()


def test_leaving_waits_for_the_save_in_flight(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with held_back() as may_write, Saver(checkpoints, alone(), snapshot=Snapshot(state())) as saver:
        saver.start(1, state(), ABOUT)
        threading.Timer(0.2, may_write.set).start()
    assert checkpoints.steps() == [1]


def test_the_host_memory_is_the_states_size_and_is_used_again(tmp_path: Path) -> None:
    fragments = state()
    snapshot = Snapshot(fragments)
    exact = sum(one.data.nbytes for one in fragments)
    assert exact <= snapshot.num_bytes < exact + ALIGNMENT * len(fragments)
    places = [[one.data.data_ptr() for one in snapshot.take(fragments)] for _ in range(2)]
    assert places[0] == places[1]
    for copy, original in zip(snapshot.take(fragments), fragments, strict=True):
        assert torch.equal(copy.data, original.data)


def test_a_failure_beside_training_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    def fail_on_rank_1(path: Path, *args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device", str(path))
        return real(path, *args, **kwargs)

    def be_rank() -> tuple[str, list[int]]:
        ranks = connect(timeout_minutes=5)
        fragments = [Fragment("weight/a", (2,), ranks.rank, torch.ones(1))]
        saver = Saver(checkpoints, ranks, snapshot=Snapshot(fragments))
        saver.start(1, fragments, ABOUT)
        sums = [ranks.sum([i])[0] for i in range(100)]  # training's own collectives go on
        with pytest.raises(SaveError) as raised:
            saver.finish()
        return str(raised.value), sums

    checkpoints, real = Checkpoints(tmp_path), train.checkpoint.checkpoints.write_tensors
    with mock.patch.object(train.checkpoint.checkpoints, "write_tensors", fail_on_rank_1):
        (message, sums), other = run_ranks(2, be_rank)
    assert (message, sums) == other
    assert sums == [2 * i for i in range(100)]
    assert "rank 1: [Errno 28] No space left on device" in message
    assert list(checkpoints.folder.iterdir()) == []


def test_files_that_a_killed_save_of_more_ranks_left_are_not_taken_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    left = checkpoints.folder / "step-00000001.partial"
    left.mkdir(parents=True)
    (left / "rank-00003.safetensors").write_bytes(b"half")
    checkpoints.save(1, state(), ranks=alone(), about=ABOUT)
    assert checkpoints.find_newest(alone()) is not None
