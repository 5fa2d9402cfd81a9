"""Which stage of a pipeline holds which blocks, and which rank holds which stages."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from model.config import ModelConfig
from model.cost import flops_by_block
from model.part import Part, cut_blocks
from train.layout.parallel import ParallelConfig, PipelineSchedule


class Stages(NamedTuple):
    """The model's parts, in order, and the places in the pipeline of the ranks that hold them."""

    parts: list[Part]
    owners: list[int]

    def of(self, owner: int) -> list[Part]:
        return [part for part, rank in zip(self.parts, self.owners, strict=True) if rank == owner]


def plan_stages(parallel: ParallelConfig, model: ModelConfig, *, seq_len: int) -> Stages:
    """The stages of a run: as `pipeline_layers` says, or balanced by FLOPs."""
    count = count_stages(parallel)
    layers = parallel.pipeline_layers
    if layers is None:
        *blocks, end = flops_by_block(model, seq_len=seq_len)
        layers = balance([*blocks[:-1], blocks[-1] + end], count)
    return Stages(cut_blocks(layers), stage_owners(parallel))


def count_stages(parallel: ParallelConfig) -> int:
    return parallel.pipeline * parallel.pipeline_schedule.parts_per_rank


def can_run(parallel: ParallelConfig, num_micro_batches: int) -> bool:
    """Whether the schedule takes that many micro-batches (torch 2.13's conditions)."""
    match parallel.pipeline_schedule:
        case PipelineSchedule.dualpipev:
            return num_micro_batches >= count_stages(parallel)
        case PipelineSchedule.interleaved | PipelineSchedule.zero_bubble:
            rounds = max(1, num_micro_batches // parallel.pipeline)
            return num_micro_batches % rounds == 0
        case _:
            return True


def stage_owners(parallel: ParallelConfig) -> list[int]:
    """Round and round, or down the ranks and up again."""
    ranks = range(parallel.pipeline)
    if parallel.pipeline_schedule.is_v_shaped:
        return [*ranks, *reversed(ranks)]
    return [*ranks] * parallel.pipeline_schedule.parts_per_rank


def balance(costs: Sequence[float], count: int) -> list[int]:
    """Lengths of `count` runs of `costs`, none empty, whose largest sum is as small as can be."""
    assert len(costs) >= count, "check_layout asks for a block per stage"

    @cache
    def best(start: int, runs: int) -> tuple[float, list[int]]:
        """The largest sum, and the ends, of the best runs from `start` on."""
        if runs == 1:
            return sum(costs[start:]), [len(costs)]
        choices = []
        for end in range(start + 1, len(costs) - runs + 2):
            largest, ends = best(end, runs - 1)
            choices.append((max(sum(costs[start:end]), largest), [end, *ends]))
        return min(choices)

    return [end - start for start, end in pairwise([0, *best(0, count)[1]])]
