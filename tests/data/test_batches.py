"""Ranks share the samples out in order, whatever their number, and nothing is lost or doubled."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import Batch, Batches, collate, validation_batches
from data.config import FilesData, Verify
from data.manifest import Split
from data.prepare import Prepared
from data.samples import IGNORED, Sample, Samples, open_samples

SEQ_LEN = 32


@pytest.fixture(scope="module")
def samples(prepared: Prepared) -> Samples:
    return open_train(prepared)


def open_train(prepared: Prepared) -> Samples:
    return open_samples(read_config(prepared), Split.train, seed=1)


def read_config(prepared: Prepared) -> FilesData:
    return FilesData(
        folder=str(prepared.folder), paths=["unused"], seq_len=SEQ_LEN, verify=Verify.fast
    )


def join(batches: list[Batch]) -> torch.Tensor:
    return torch.cat(
        [torch.stack([x.tokens, x.targets, x.positions, x.is_real], 1) for x in batches]
    )


@pytest.mark.parametrize(
    ("world", "micro_batch_size"), [(1, 1), (1, 24), (2, 3), (3, 4), (4, 2), (24, 1)]
)
def test_the_ranks_together_read_the_samples_in_order(
    samples: Samples, world: int, micro_batch_size: int
) -> None:
    first, count = 7, 24
    expected = join([collate([samples[index]]) for index in range(first, first + count)])
    shares = []
    for rank in range(world):
        with Batches(samples, rank=rank, world=world, micro_batch_size=micro_batch_size) as batches:
            shares.append(batches.take(first, count))
    in_order = [share[m] for m in range(len(shares[0])) for share in shares]
    assert all(batch.tokens.shape == (micro_batch_size, SEQ_LEN) for batch in in_order)
    assert torch.equal(join(in_order), expected)


def test_a_batch_keeps_each_samples_segments(samples: Samples) -> None:
    batch = collate([samples[index] for index in range(6)])
    assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
    assert sum(batch.document_lengths) == 6 * SEQ_LEN
    expected = [length for index in range(6) for length in samples[index].document_lengths]
    assert batch.document_lengths == expected


def test_the_next_batch_is_read_ahead_and_a_wrong_guess_is_read_anew(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = open_train(prepared)
    expected = {index: samples[index] for index in range(100)}
    read: list[tuple[int, str]] = []

    def recorded(self: Samples, index: int) -> Sample:
        read.append((index, threading.current_thread().name))
        return expected[index]

    monkeypatch.setattr(Samples, "__getitem__", recorded)
    batches = Batches(samples, rank=0, world=1, micro_batch_size=2)
    for first, count in [(0, 4), (4, 4), (8, 2), (50, 6)]:
        (tokens,) = [torch.cat([batch.tokens for batch in batches.take(first, count)])]
        for place, index in enumerate(range(first, first + count)):
            assert tokens[place].tolist() == expected[index].tokens.tolist()
    batches.close()
    indices = [index for index, _ in read]
    assert indices[:12] == list(range(12))  # 0-3, 4-7 ahead, 8-11 ahead by a wrong guess
    assert indices[12:14] == [8, 9]
    assert all(name.startswith("batches") for _, name in read)
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_an_error_while_reading_ahead_surfaces_when_it_is_asked_for(
    samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Samples.__getitem__

    def fail_once(self: Samples, index: int) -> Sample:
        if index == 5:
            monkeypatch.undo()
            raise OSError("the file system vanished")
        return read(self, index)

    monkeypatch.setattr(Samples, "__getitem__", fail_once)
    with Batches(samples, rank=0, world=1, micro_batch_size=1) as batches:
        batches.take(0, 4)
        with pytest.raises(OSError, match="vanished"):
            batches.take(4, 4)
        again = batches.take(4, 4)
        assert torch.equal(join(again), join([collate([samples[k]]) for k in range(4, 8)]))


def test_a_global_batch_that_the_ranks_cannot_share_is_refused(samples: Samples) -> None:
    batches = Batches(samples, rank=0, world=2, micro_batch_size=3)
    with batches, pytest.raises(ValueError, match=r"8 samples is not divisible by 2 ranks .* of 6"):
        batches.take(0, 8)


@settings(max_examples=100, deadline=None)
@given(
    targets=st.integers(1, 8).flatmap(
        lambda size: st.lists(
            st.lists(st.sampled_from([IGNORED, 0, 5]), min_size=size, max_size=size),
            min_size=1,
            max_size=3,
        )
    ),
    depth=st.integers(0, 9),
)
def test_targets_of_a_depth_are_counted_as_by_a_loop(targets: list[list[int]], depth: int) -> None:
    tensor = torch.tensor(targets)
    batch = Batch(tensor, tensor, tensor, tensor.bool(), [])
    expected = 0
    for row in targets:
        for place in range(len(row)):
            reach = row[place : place + depth + 1]
            expected += place + depth < len(row) and all(target != IGNORED for target in reach)
    assert batch.num_targets(depth) == expected


@pytest.mark.parametrize(("world", "micro_batch_size"), [(1, 4), (2, 3), (3, 2)])
@pytest.mark.parametrize("limit", [None, 5, 10_000])
def test_validation_reads_every_target_once_in_equally_many_batches(
    prepared: Prepared, world: int, micro_batch_size: int, limit: int | None
) -> None:
    samples = open_samples(read_config(prepared), Split.validation, seed=1)
    size = min(samples.num_samples, limit or samples.num_samples)
    shares = [
        list(
            validation_batches(
                samples, rank=rank, world=world, micro_batch_size=micro_batch_size, limit=limit
            )
        )
        for rank in range(world)
    ]
    assert {len(share) for share in shares} == {-(-size // (world * micro_batch_size))}
    in_order = join([share[m] for m in range(len(shares[0])) for share in shares])
    assert torch.equal(in_order[:size], join([collate([samples[k]]) for k in range(size)]))
    assert (in_order[size:, 1] == IGNORED).all()
    assert in_order[:size, 3].all()
    assert not in_order[size:, 3].any()
    total = sum(batch.num_targets() for share in shares for batch in share)
    assert total == sum(int((samples[k].targets != IGNORED).sum()) for k in range(size))
