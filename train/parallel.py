"""How a run is laid out over ranks, and which layouts exist."""

from dataclasses import dataclass
from enum import StrEnum

from model.config import ModelConfig
from train.schedule import ScheduleConfig


class Recompute(StrEnum):
    """Activations kept for the backward pass: all of them, or only each block's input."""

    none = "none"
    full = "full"


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    #: Ranks over which each layer's routed experts are spread.
    expert: int = 1
    #: DeepSpeed ZeRO stage: 1 shares out optimizer states, 2 gradients as well.
    zero_stage: int = 1
    #: Sequences in one forward pass of one rank; accumulation follows from the batch size.
    micro_batch_size: int
    #: What the backward pass computes again to save memory.
    recompute: Recompute = Recompute.none
    #: Gradient elements per reduction; larger is faster and takes more memory.
    reduce_bucket_size: int = 50_000_000
    #: Whether gradients are reduced beside the backward pass (GPUs only).
    overlap_comm: bool = False


def check_parallel(
    parallel: ParallelConfig, model: ModelConfig, schedule: ScheduleConfig, *, num_ranks: int
) -> None:
    """Refuse, with a ValueError naming both settings, a layout that can't be built."""
    if parallel.expert < 1 or num_ranks % parallel.expert:
        raise ValueError(
            f"parallel.expert={parallel.expert} does not divide the {num_ranks} ranks; "
            f"choose one of {_divisors(num_ranks)} or another number of ranks"
        )
    if parallel.expert > 1 and model.moe is None:
        raise ValueError(
            f"parallel.expert={parallel.expert}, but model.moe=null has no experts; "
            "choose parallel.expert=1"
        )
    num_experts = model.moe.num_experts if model.moe is not None else 0
    if num_experts % parallel.expert:
        raise ValueError(
            f"model.moe.num_experts={num_experts} is not divisible by "
            f"parallel.expert={parallel.expert}; choose parallel.expert from "
            f"{[d for d in _divisors(num_ranks) if num_experts % d == 0]}"
        )
    if parallel.zero_stage not in (1, 2):
        raise ValueError(
            f"parallel.zero_stage={parallel.zero_stage} is not supported; choose 1 or 2 "
            "(stage 0 clips expert gradients wrongly in DeepSpeed 0.19.8)"
        )
    if parallel.micro_batch_size < 1:
        raise ValueError(
            f"parallel.micro_batch_size={parallel.micro_batch_size} must be at least 1"
        )
    if parallel.reduce_bucket_size < 1:
        raise ValueError(
            f"parallel.reduce_bucket_size={parallel.reduce_bucket_size} must be at least 1"
        )
    _check_batches(parallel, schedule, num_ranks=num_ranks)


def _check_batches(parallel: ParallelConfig, schedule: ScheduleConfig, *, num_ranks: int) -> None:
    per_pass = parallel.micro_batch_size * num_ranks
    sizes = {"schedule.batch_size": schedule.batch_size}
    if schedule.batch_ramp.start is not None:
        sizes["schedule.batch_ramp.start"] = schedule.batch_ramp.start
        sizes["schedule.batch_ramp.increment"] = schedule.batch_ramp.increment
    for key, value in sizes.items():
        if value % per_pass:
            raise ValueError(
                f"{key}={value} is not divisible by parallel.micro_batch_size="
                f"{parallel.micro_batch_size} times {num_ranks} ranks; "
                f"choose a multiple of {per_pass} or a smaller micro-batch"
            )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
