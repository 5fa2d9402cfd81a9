"""`python -m bench.overlap`: what it gives to compute the shared experts while rows travel.

Two ranks, experts spread over both, on the CPU, where gloo's threads send. Wall-clock time of
forward and backward of an MoE layer as it is, beside the same layer that waits for each message as
soon as it has departed, in turns.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from bench.ranks import on_ranks
from model.exchange import Flight
from model.init import initialise
from model.moe import MoE, MoEConfig
from model.router import RouterConfig

RANKS, DIM, BATCH_SIZE, SEQ_LEN = 2, 256, 4, 512
ROUNDS = 41
CONFIG = MoEConfig(
    num_experts=32, top_k=4, expert_dim=128, num_shared_experts=2, router=RouterConfig()
)


@contextmanager
def waiting() -> Iterator[None]:
    """Within it nothing is computed while rows travel."""
    begin = Flight.__init__

    def begin_and_wait(flight: Flight, *args: Any) -> None:
        begin(flight, *args)
        flight._work.wait()

    Flight.__init__ = begin_and_wait
    try:
        yield
    finally:
        Flight.__init__ = begin


def seconds(moe: MoE, x: torch.Tensor) -> float:
    """Wall-clock time until the slower rank has ended its step."""
    counted = torch.ones(x.shape[:2], dtype=torch.bool)
    dist.barrier()
    start = time.perf_counter()
    moe(x, counted).hidden.sum().backward()
    dist.barrier()
    return time.perf_counter() - start


def measure(rank: int) -> None:
    x = torch.randn(BATCH_SIZE, SEQ_LEN, DIM, requires_grad=True)
    moe = MoE(CONFIG, dim=DIM, expert_group=dist.group.WORLD)
    initialise(moe, seed=0, std=0.02)
    times: dict[str, list[float]] = {"waiting": [], "beside": []}
    for i in range(ROUNDS + 3):
        for name in times if i % 2 else reversed(times):
            if name == "waiting":
                with waiting():
                    taken = seconds(moe, x)
            else:
                taken = seconds(moe, x)
            if i >= 3:  # after warming up
                times[name].append(taken)
    if rank == 0:
        for name, measured in times.items():
            print(f"{name}: {statistics.median(measured) * 1e3:6.1f} ms (median of {ROUNDS})")
        ratios = [b / w for w, b in zip(times["waiting"], times["beside"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        print(
            f"beside / waiting: {statistics.median(ratios):.3f} (quartiles {low:.3f}, {high:.3f})"
        )


def main() -> None:
    on_ranks(RANKS, measure)


if __name__ == "__main__":
    main()
