"""Ranks share the samples out in order, whatever their number, and nothing is lost or doubled."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import Batch, Batches, collate, to_batch, validation_batches
from data.config import FilesData, Verify
from data.mixture import Drawn, Row
from data.position import Position
from data.prepare import Prepared
from data.rows import Rows
from data.samples import IGNORED, open_samples
from data.training_data import TrainingData

SEQ_LEN = 32


@pytest.fixture(scope="module")
def order(prepared: Prepared) -> TrainingData:
    return open_train(prepared)


def open_train(prepared: Prepared) -> TrainingData:
    return TrainingData(read_config(prepared), seed=1)


def read_alone(order: TrainingData, count: int) -> torch.Tensor:
    """The first samples, one after another in batches of one."""
    position, batches = Position(), []
    for _ in range(count):
        rows, position = order.draw(position, 1)
        batches += map(to_batch, order.read(rows, 1))
    return join(batches)


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
    order: TrainingData, world: int, micro_batch_size: int
) -> None:
    before, count = order.draw(Position(), 7).position, 24
    expected = read_alone(order, 7 + count)[7:]
    shares = []
    for rank in range(world):
        with Batches(order, rank=rank, world=world, micro_batch_size=micro_batch_size) as batches:
            taken = batches.take(before, count)
        shares.append(taken.batches)
        assert taken.position == order.draw(Position(), 7 + count).position
    in_order = [share[m] for m in range(len(shares[0])) for share in shares]
    assert all(batch.tokens.shape == (micro_batch_size, SEQ_LEN) for batch in in_order)
    assert torch.equal(join(in_order), expected)


def test_a_batch_keeps_each_samples_segments(order: TrainingData) -> None:
    rows = order.draw(Position(), 6).rows
    batch = to_batch(order.read(rows, 6)[0])
    assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
    assert sum(batch.document_lengths) == 6 * SEQ_LEN
    expected = [length for row in rows for length in order.read([row], 1)[0].document_lengths]
    assert batch.document_lengths == expected


def test_the_next_batch_is_read_ahead_and_a_wrong_guess_is_read_anew(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = open_train(prepared)
    expected = read_alone(order, 100)
    draw, drawn = order.draw, []

    def recorded(position: Position, count: int) -> Drawn[Row]:
        drawn.append((position.samples, count, threading.current_thread().name))
        return draw(position, count)

    monkeypatch.setattr(order, "draw", recorded)
    batches = Batches(order, rank=0, world=1, micro_batch_size=2)
    at_50 = draw(Position(), 50).position
    position = Position()
    for first, count in [(0, 4), (4, 4), (8, 2), (50, 6)]:
        taken = batches.take(at_50 if first == 50 else position, count)
        assert torch.equal(join(taken.batches), expected[first : first + count])
        position = taken.position
        assert position.samples == first + count
    batches.close()
    asked = [(first, count) for first, count, _ in drawn]
    # 8-12 is read ahead by a wrong guess.
    assert asked[:5] == [(0, 4), (4, 4), (8, 4), (8, 2), (10, 2)]
    assert all(name.startswith("batches") for _, _, name in drawn)
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


def test_an_error_while_reading_ahead_surfaces_when_it_is_asked_for(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = open_train(prepared)
    read, calls = order.read, 0

    def fail_once(rows: list[Row], batch_size: int) -> list[Rows]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("the file system vanished")
        return read(rows, batch_size)

    monkeypatch.setattr(order, "read", fail_once)
    with Batches(order, rank=0, world=1, micro_batch_size=1) as batches:
        _, position = batches.take(Position(), 4)
        with pytest.raises(OSError, match="vanished"):
            batches.take(position, 4)
        again = batches.take(position, 4)
        assert torch.equal(join(again.batches), read_alone(order, 8)[4:])


def test_a_global_batch_that_the_ranks_cannot_share_is_refused(order: TrainingData) -> None:
    batches = Batches(order, rank=0, world=2, micro_batch_size=3)
    with batches, pytest.raises(ValueError, match=r"8 samples is not divisible by 2 ranks .* of 6"):
        batches.take(Position(), 8)


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
    samples = open_samples(read_config(prepared))
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
