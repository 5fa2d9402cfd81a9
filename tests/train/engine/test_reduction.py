"""ZeRO 0's gradients travel beside the backward pass that makes them, and no bit changes."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import ranks
from tests.train.tiny import random_batches, tiny_run
from train.engine.engine import Engine, join
from train.layout.parallel import ParallelConfig
from train.precision import Dtype, PrecisionConfig
from train.update import count_denominators, objective


def backward(
    folder: Path,
    *,
    overlap_comm: bool,
    bucket_size: int,
    micro_batch_size: int,
    expert: int = 1,
    dtype: Dtype = Dtype.fp32,
) -> Engine:
    """An engine after a step's last backward pass."""
    parallel = ParallelConfig(
        zero_stage=0,
        expert=expert,
        micro_batch_size=micro_batch_size,
        reduce_bucket_size=bucket_size,
        overlap_comm=overlap_comm,
    )
    config = tiny_run(folder, parallel=parallel, precision=PrecisionConfig(dtype=dtype))
    of_run = join(config.parallel, timeout_minutes=5)
    engine = Engine(config, of_run)
    batches = random_batches(
        0, rank=of_run.replica, num_ranks=of_run.count, micro_batch_size=micro_batch_size
    )
    over = count_denominators(batches, config.model, of_run)
    engine.accumulate(batches, lambda sums: objective(sums, over, config.model))
    return engine


@pytest.mark.parametrize(
    ("bucket_size", "dtype"),
    [(3_000, Dtype.fp32), pytest.param(10**9, Dtype.bf16, marks=pytest.mark.slow)],
)
@ranks(4)
def test_gradients_beside_the_backward_pass_are_the_same_bits(
    tmp_path: Path, bucket_size: int, dtype: Dtype
) -> None:
    after, beside = (
        list(
            backward(
                tmp_path,
                overlap_comm=overlap_comm,
                bucket_size=bucket_size,
                micro_batch_size=1,
                expert=2,
                dtype=dtype,
            ).gradients()
        )
        for overlap_comm in (False, True)
    )
    assert len(after) > 0
    for got, wanted in zip(beside, after, strict=True):
        assert got.name == wanted.name
        assert torch.equal(got.data, wanted.data), got.name


@ranks(2, seconds=30)
def test_a_bucket_travels_while_the_backward_pass_goes_on(tmp_path: Path) -> None:
    """Rank 1 lets no bucket leave before rank 0 has made the embedding's gradient, the last one: a
    rank 0 that waited for a bucket first would wait for ever."""
    store = dist.distributed_c10d._get_default_store()
    is_first = dist.get_rank() == 0
    all_reduce = dist.all_reduce
    events: list[str] = []

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("async_op"):
            events.append("a bucket leaves")
            if not is_first:
                store.wait(["embedding"])
        return all_reduce(tensor, *args, **kwargs)

    look_up = torch.nn.Embedding.forward

    def note_gradient(_: Tensor) -> None:
        events.append("the embedding's gradient")
        if is_first:
            store.set("embedding", "")

    def watched(embedding: torch.nn.Embedding, tokens: Tensor) -> Tensor:
        embedded = look_up(embedding, tokens)
        embedded.register_hook(note_gradient)
        return embedded

    with (
        patch.object(dist, "all_reduce", noted),
        patch.object(torch.nn.Embedding, "forward", watched),
    ):
        backward(tmp_path, overlap_comm=True, bucket_size=40_000, micro_batch_size=4)
    leaves = "a bucket leaves"  # of three, two at a time
    assert events == [leaves, leaves, "the embedding's gradient", leaves]
