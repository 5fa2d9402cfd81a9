"""What a layout sends, in bytes that one rank sends in a step, before anything is started.

Collectives are counted as rings: an all-reduce of n bytes among s ranks sends 2 (s-1)/s n, a
reduce-scatter or an all-gather (s-1)/s n. Routing is taken as balanced. What real ranks hand to
all-reduces and all-to-alls is counted in `tests/train/layout/test_traffic.py`, and equals these
numbers.
"""

from collections.abc import Iterable
from typing import NamedTuple

from model.gqa import GQAConfig
from model.mla import MLAConfig
from model.recompute import Recompute
from model.wire import message_bytes
from train.config import RunConfig
from train.layout.memory import Share, shares_of
from train.layout.parallel import ParallelConfig

FP32 = 4


class Traffic(NamedTuple):
    """Bytes that a rank sends in one step, by what they carry."""

    gradients: float  # reduced over the ranks with the same parameters
    weights: float  # gathered from their owners
    experts: float  # tokens to their experts and back, and the gradients of both
    sequences: float  # heads for tokens and back
    stages: float  # states to the next stage, gradients to the one before

    @property
    def total(self) -> float:
        return sum(self)


def largest_traffic(config: RunConfig, *, num_ranks: int) -> Traffic:
    """Of the pipeline rank with most parameters, and an equal share of the layers for tokens."""
    parallel, model = config.parallel, config.model
    size = config.precision.dtype.torch.itemsize
    num_replicas = num_ranks // (parallel.sequence * parallel.pipeline)
    micro_batches = config.schedule.batch_size // (parallel.micro_batch_size * num_replicas)
    stages = range(parallel.pipeline)
    gradients, weights = max(
        _of_parameters(
            shares_of(config, stage, num_ranks=num_ranks),
            parallel,
            size=size,
            micro_batches=micro_batches,
        )
        for stage in stages
    )
    tokens = micro_batches * parallel.micro_batch_size * config.data.seq_len / parallel.sequence
    num_layers = (model.num_layers + model.mtp.depth) / parallel.pipeline
    experts = sequences = 0.0
    if model.moe is not None:
        # There and back, forward and backward; full recomputation goes there and back again.
        trips = 6 if parallel.recompute is Recompute.full else 4
        row = model.dim * size * _others(parallel.expert)
        if config.precision.fp8:  # what goes to the experts: every other trip
            row = (row + message_bytes(model.dim) * _others(parallel.expert)) / 2
        experts = trips * tokens * model.moe.top_k * row * model.num_moe_layers / parallel.pipeline
    if parallel.sequence > 1:
        trips = 3 if parallel.recompute is Recompute.full else 2
        row = _attention_width(config) * size * _others(parallel.sequence)
        sequences = trips * tokens * row * num_layers
    borders = parallel.pipeline_schedule.parts_per_rank if parallel.pipeline > 1 else 0
    states = 2.0 * borders * tokens * model.dim * size
    return Traffic(gradients, weights, experts, sequences, states)


def _of_parameters(
    shares: Iterable[Share], parallel: ParallelConfig, *, size: int, micro_batches: int
) -> tuple[float, float]:
    """Gradients' and weights' bytes."""
    gradients = weights = 0.0
    for share in shares:
        whole = share.elements * _others(share.sharers)
        match parallel.zero_stage:
            case 0:
                gradients += 2 * whole * FP32
            case 1:  # buckets are all-reduced, in the weights' precision
                gradients += 2 * whole * size
                weights += whole * size
            case 2:  # after every micro-batch
                gradients += 2 * whole * size * micro_batches
                weights += whole * size
            case _:  # gathered for forward, and again for backward
                gradients += whole * size * micro_batches
                weights += 2 * whole * size * micro_batches
    return gradients, weights


def _others(ranks: int) -> float:
    """The part of something evenly spread that the other ranks have."""
    return (ranks - 1) / ranks


def _attention_width(config: RunConfig) -> int:
    """Elements of a token's query, key, value and result, over all heads."""
    attention = config.model.attention
    if isinstance(attention, MLAConfig):
        width = attention.nope_head_dim + attention.rope_head_dim
        return attention.num_heads * 2 * (width + attention.v_head_dim)
    assert isinstance(attention, GQAConfig), "the kinds are two"
    return 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
