"""`python -m bench.overlap`: what it gives to compute something while rows travel.

Two ranks, experts spread over both, on the CPU, where gloo's threads send. Wall-clock time of
forward and backward, all in turns: an MoE layer, whose shared experts are computed meanwhile; a
block, which does the same; and the block in two halves (`parallel.overlap_halves`), of which one is
computed while the other's rows travel. Each beside itself waiting for every message as soon as it
has departed.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.ranks import on_ranks
from model.block import Block
from model.config import MLAModelConfig
from model.exchange import Flight
from model.init import initialise
from model.mla import MLAConfig
from model.moe import MoE, MoEConfig
from model.rope import rotation
from model.router import RouterConfig
from model.sequences import WholeSequences

RANKS, DIM, BATCH_SIZE, SEQ_LEN = 2, 256, 4, 512
ROUNDS = 41
CONFIG = MoEConfig(
    num_experts=32, top_k=4, expert_dim=128, num_shared_experts=2, router=RouterConfig()
)
ATTENTION = MLAConfig(
    num_heads=4,
    q_lora_rank=128,
    kv_lora_rank=128,
    nope_head_dim=32,
    rope_head_dim=16,
    v_head_dim=32,
)
MODEL = MLAModelConfig(
    vocab_size=512, dim=DIM, num_layers=1, ffn_dim=DIM, attention=ATTENTION, moe=CONFIG
)

Forward = Callable[[], Tensor]


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


def layer(x: Tensor) -> Forward:
    """An MoE layer's forward pass."""
    moe = MoE(CONFIG, dim=DIM, expert_group=dist.group.WORLD)
    initialise(moe, seed=0, std=0.02)
    counted = torch.ones(x.shape[:2], dtype=torch.bool)
    return lambda: moe(x, counted).hidden


def block(x: Tensor, *, in_halves: bool) -> Forward:
    """A whole block's."""
    made = Block(
        MODEL,
        is_dense=False,
        expert_group=dist.group.WORLD,
        sequences=WholeSequences(),
        in_halves=in_halves,
    )
    initialise(made, seed=0, std=0.02)
    turn = rotation(MODEL.rope, torch.arange(SEQ_LEN).expand(BATCH_SIZE, -1), dim=16)
    counted = torch.ones(x.shape[:2], dtype=torch.bool)
    return lambda: made(x, turn, counted, segments=[SEQ_LEN] * BATCH_SIZE).hidden


def seconds(forward: Forward) -> float:
    """Wall-clock time until the slower rank has ended its step."""
    dist.barrier()
    start = time.perf_counter()
    forward().sum().backward()
    dist.barrier()
    return time.perf_counter() - start


def measure(rank: int) -> None:
    x = torch.randn(BATCH_SIZE, SEQ_LEN, DIM, requires_grad=True)
    forwards = {
        "MoE layer": layer(x),
        "block": block(x, in_halves=False),
        "block in halves": block(x, in_halves=True),
    }
    names = [(name, waits) for name in forwards for waits in (True, False)]
    times: dict[tuple[str, bool], list[float]] = {name: [] for name in names}
    for i in range(ROUNDS + 3):
        for name, waits in names if i % 2 else reversed(names):
            with waiting() if waits else nullcontext():
                taken = seconds(forwards[name])
            if i >= 3:  # after warming up
                times[name, waits].append(taken)
    if rank == 0:
        for (name, waits), measured in times.items():
            how = "waiting" if waits else "beside"
            print(f"{name}, {how}: {statistics.median(measured) * 1e3:.1f} ms (of {ROUNDS})")
        for name in forwards:
            show_ratio(f"{name}, beside / waiting", times[name, False], times[name, True])
        halves, whole = times["block in halves", False], times["block", False]
        show_ratio("block in halves / block", halves, whole)


def show_ratio(name: str, over: list[float], under: list[float]) -> None:
    ratios = [one / other for one, other in zip(over, under, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"{name}: {median:.3f} (quartiles {low:.3f}, {high:.3f})")


def main() -> None:
    on_ranks(RANKS, measure)


if __name__ == "__main__":
    main()
