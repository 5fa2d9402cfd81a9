"""What a layout keeps on each rank, in bytes, before anything is started.

The state of training: weights, gradients at the end of a step's backward pass, masters and the
optimizer's moments. `tests/train/layout/test_memory.py` counts the bytes of all tensors on real
ranks and holds these numbers to them. Activations come on top (`model/memory.py`, in FP8
`model/fp8_memory.py`).

W ranks share a stage's parameters (all ranks without a pipeline); W/EP share each expert's.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch

from model.fp8_memory import kept_bytes_per_token
from model.transformer import Transformer
from train.config import RunConfig
from train.engine.stages import plan_stages
from train.layout.parallel import Offload
from train.optimizer.config import kept_states
from train.optimizer.moments import Moments
from train.optimizer.quantised_moments import BLOCK
from train.precision import Dtype

FP32 = 4
MOMENT_BYTES = {Moments.fp32: 4.0, Moments.bf16: 2.0, Moments.int8: 1 + 4 / BLOCK}


class State(NamedTuple):
    """Bytes on one rank. What is offloaded is counted in `host` or `disk` only."""

    weights: float
    gradients: float
    optimizer: float  # masters and moments
    host: float = 0.0
    disk: float = 0.0

    @property
    def device(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def plus(self, other: "State") -> "State":
        return State(*(a + b for a, b in zip(self, other, strict=True)))


class Share(NamedTuple):
    """A parameter as one rank of a stage meets it."""

    elements: int  # on this rank before ZeRO: of routed experts, its own
    sharers: int  # ranks over which ZeRO spreads it
    moments: int  # tensors that the optimizer keeps of it


def largest_state(config: RunConfig, *, num_ranks: int) -> State:
    """The state of the rank that keeps most: of the pipeline's fullest stages."""
    states = [
        _add_up(config, shares_of(config, stage, num_ranks=num_ranks))
        for stage in range(config.parallel.pipeline)
    ]
    return max(states, key=lambda state: state.device)


def activations(config: RunConfig) -> float:
    """Bytes that the blocks of the fullest stage keep for the backward pass, at most.

    Of one micro-batch; in a pipeline of as many as it has stages, which 1F1B's first stage keeps.
    With balanced routing; logits and what a layer needs while it runs come on top.
    """
    parallel, model = config.parallel, config.model
    stages = plan_stages(parallel, model, seq_len=config.data.seq_len)
    tokens = parallel.micro_batch_size * config.data.seq_len // parallel.sequence
    in_flight = len(stages.parts) if parallel.pipeline > 1 else 1
    per_token = [
        kept_bytes_per_token(
            model,
            is_dense=i < model.num_dense_layers,
            recompute=parallel.recompute,
            size=config.precision.dtype.torch.itemsize,
            is_fp8=config.precision.fp8,
        )
        for i in range(model.num_layers)
    ]
    by_rank = [
        sum(per_token[i] for part in stages.of(rank) for i in part.layers)
        for rank in range(parallel.pipeline)
    ]
    return float(max(by_rank) * tokens * in_flight)


def shares_of(config: RunConfig, pipeline_rank: int, *, num_ranks: int) -> Iterator[Share]:
    """Every parameter of the stages that a rank of a pipeline holds."""
    parallel = config.parallel
    stages = plan_stages(parallel, config.model, seq_len=config.data.seq_len)
    with torch.device("meta"):
        model = Transformer(config.model, parts=stages.of(pipeline_rank))
    sharers = num_ranks // parallel.pipeline
    for name, parameter in model.named_parameters():
        spread = parallel.expert if ".experts." in name else 1
        elements = prod(parameter.shape) // spread
        yield Share(elements, sharers // spread, len(kept_states(name, config.optimizer)))


def _add_up(config: RunConfig, shares: Iterator[Share]) -> State:
    total, largest = State(0.0, 0.0, 0.0), 0
    for share in shares:
        total = total.plus(_state_of(share, config))
        largest = max(largest, share.elements)
    parallel = config.parallel
    if parallel.zero_stage < 3 and parallel.offload_optimizer is not Offload.none:
        buffer = largest * config.precision.dtype.torch.itemsize  # through which gradients leave
        total = total.plus(State(0.0, buffer, 0.0, host=buffer))
    return total


def _state_of(share: Share, config: RunConfig) -> State:
    """One parameter's bytes, by ZeRO stage; what DeepSpeed 0.19.8 keeps beyond the papers' counts
    is in the comments."""
    parallel, size = config.parallel, config.precision.dtype.torch.itemsize
    is_fp32 = config.precision.dtype is Dtype.fp32
    whole, part = share.elements, share.elements / share.sharers
    kept = FP32 + share.moments * MOMENT_BYTES[config.optimizer.moments]
    if parallel.zero_stage == 0:  # ours: in fp32 the weights are their own masters
        kept -= FP32 * is_fp32
        return State(whole * size, whole * FP32, whole * kept)
    weights, gradients = float(whole * size), part * FP32
    if parallel.zero_stage == 1 and not is_fp32:
        # fp32 accumulators of all gradients stay; outside of a pipeline those in BF16 too
        gradients = whole * (FP32 + (size if parallel.pipeline == 1 else 0))
    if parallel.zero_stage == 3:
        weights = part * size
    state = State(weights, gradients, part * kept)
    if parallel.offload_optimizer is not Offload.none:
        state = _move_optimizer(state, whole, part, config)
    if parallel.offload_parameters is not Offload.none:
        state = _moved(state, parallel.offload_parameters, weights=weights)
    if parallel.zero_stage == 3 and whole <= parallel.keep_whole and share.sharers > 1:
        state = state._replace(weights=state.weights + whole * size)
    return state


def _move_optimizer(state: State, whole: int, part: float, config: RunConfig) -> State:
    """Masters, moments and a copy of a step's gradients; accumulators stay where they are."""
    parallel, size = config.parallel, config.precision.dtype.torch.itemsize
    state = _moved(state, parallel.offload_optimizer, optimizer=state.optimizer, copy=part * FP32)
    updated = part * size  # a buffer for new weights on their way to the device
    if parallel.zero_stage == 3:
        return state._replace(gradients=0.0, host=state.host + part * FP32)
    if config.precision.dtype is Dtype.fp32:
        return state._replace(gradients=0.0, host=state.host + part * FP32 + updated)
    accumulated = part if parallel.zero_stage == 2 else float(whole)
    return state._replace(gradients=accumulated * FP32, host=state.host + updated)


def _moved(
    state: State,
    where: Offload,
    *,
    weights: float = 0.0,
    optimizer: float = 0.0,
    copy: float = 0.0,
) -> State:
    """These bytes, and those of a copy of something, are on the host or the disk instead."""
    state = state._replace(weights=state.weights - weights, optimizer=state.optimizer - optimizer)
    moved = weights + optimizer + copy
    if where is Offload.nvme:
        return state._replace(disk=state.disk + moved)
    return state._replace(host=state.host + moved)
