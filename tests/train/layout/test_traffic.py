"""What `train/layout/traffic.py` says a layout sends is what real ranks give to collectives."""

from collections import Counter
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters

from model.recompute import Recompute
from tests.ranks import run_ranks
from tests.train.layout.test_memory import wide_model
from tests.train.tiny import random_batches, tiny_run
from train.config import RunConfig, check_run
from train.engine.engine import Engine, join
from train.layout.parallel import ParallelConfig
from train.layout.traffic import largest_traffic
from train.precision import Dtype, PrecisionConfig
from train.ranks import Ranks
from train.update import count_denominators, update

PRECISIONS = {
    "fp32": PrecisionConfig(dtype=Dtype.fp32),
    "bf16": PrecisionConfig(dtype=Dtype.bf16),
    "fp8": PrecisionConfig(dtype=Dtype.bf16, fp8=True),
}


def count_messages(config: RunConfig, num_ranks: int) -> Counter[str]:
    """Bytes of numbers that all ranks hand to each collective in one step."""
    check_run(config, num_ranks=num_ranks)

    def on_rank() -> Counter[str]:
        counts: Counter[str] = Counter()

        def counted(name: str, argument: str) -> Any:
            collective = getattr(dist, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                sent = signature(collective).bind(*args, **kwargs).arguments[argument]
                if sent.dtype.is_floating_point or sent.dtype == torch.uint8:  # of FP8
                    counts[name] += sent.nbytes
                return collective(*args, **kwargs)

            return mock.patch.object(dist, name, call)

        ranks = join(config.parallel, timeout_minutes=5)
        engine = Engine(config, ranks)
        with counted("all_reduce", "tensor"), counted("all_to_all_single", "input"):
            take_step(engine, config, ranks)
        return counts

    total: Counter[str] = Counter()
    for counts in run_ranks(num_ranks, on_rank):
        total.update(counts)
    return total


def take_step(engine: Engine, config: RunConfig, ranks: Ranks) -> None:
    batches = random_batches(
        0,
        rank=ranks.replica,
        num_ranks=ranks.num_replicas,
        micro_batch_size=config.parallel.micro_batch_size,
    )
    over = count_denominators(batches, config.model, ranks)
    update(engine, batches, over, config=config.model, lr=1e-4)


@pytest.mark.parametrize(
    ("num_ranks", "accumulation", "layout", "precision"),
    [
        pytest.param(2, 2, {"zero_stage": 0}, "bf16", marks=pytest.mark.slow),
        pytest.param(2, 2, {"zero_stage": 1}, "bf16", marks=pytest.mark.slow),
        (2, 2, {"zero_stage": 2}, "bf16"),
        pytest.param(2, 1, {"zero_stage": 1, "expert": 2}, "fp32", marks=pytest.mark.slow),
        pytest.param(2, 1, {"zero_stage": 1, "expert": 2}, "fp8", marks=pytest.mark.slow),
        pytest.param(
            *(2, 2, {"zero_stage": 1, "expert": 2, "recompute": Recompute.full}, "bf16"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_sends_what_is_planned(
    tmp_path: Path, num_ranks: int, accumulation: int, layout: dict[str, Any], precision: str
) -> None:
    parallel = ParallelConfig(micro_batch_size=8 // num_ranks // accumulation, **layout)
    config = tiny_run(tmp_path, model=wide_model(), parallel=parallel)
    config.precision = PRECISIONS[precision]
    planned = largest_traffic(config, num_ranks=num_ranks)
    sent = count_messages(config, num_ranks)
    others = (num_ranks - 1) / num_ranks
    if parallel.expert == 1:
        all_reduced = num_ranks * planned.gradients / (2 * others)
        assert sent["all_reduce"] == pytest.approx(all_reduced, rel=0.01)
    else:  # a rank's own rows are handed over too, but sent to nobody
        assert sent["all_to_all_single"] == pytest.approx(num_ranks * planned.experts / others)


@pytest.mark.slow
def test_zero_3_gathers_weights_once_for_both_halves(tmp_path: Path) -> None:
    def gathered(*, overlap_halves: bool) -> list[int]:
        """Elements gathered in a step that DeepSpeed traces, and in the one after it."""
        parallel = ParallelConfig(
            zero_stage=3, expert=2, keep_whole=0, micro_batch_size=4, overlap_halves=overlap_halves
        )
        config = tiny_run(tmp_path, model=wide_model(), parallel=parallel)
        gather = partition_parameters._dist_allgather_fn
        counts: list[int] = []

        def counted(own: Any, whole: Any, *args: Any, **kwargs: Any) -> Any:
            counts[-1] += whole.numel()
            return gather(own, whole, *args, **kwargs)

        def on_rank() -> list[int]:
            ranks = join(config.parallel, timeout_minutes=5)
            engine = Engine(config, ranks)
            with mock.patch.object(partition_parameters, "_dist_allgather_fn", counted):
                for _ in range(2):
                    counts.append(0)
                    take_step(engine, config, ranks)
            return counts

        return run_ranks(2, on_rank)[0]

    whole, in_halves = gathered(overlap_halves=False), gathered(overlap_halves=True)
    assert whole[1] > 0
    assert in_halves == whole
