"""`python -m bench.imbalance`: what `max_tokens_per_chunk` costs balanced steps, and what it saves.

Two ranks, experts spread over both, on the CPU. CPU time of forward and backward of an MoE layer
with a limit that the counts fit, beside one without a limit, in turns: the difference is what every
balanced step pays. Then a step in which every token chooses the first rank's experts: its CPU time,
and the bytes of tensors at the first rank's peak, without a limit and with several.
"""

import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from bench.ranks import on_ranks
from model.init import initialise
from model.memory import routed_peak
from model.moe import MoE, MoEConfig
from model.router import RouterConfig
from tests.live_bytes import LiveBytes

RANKS, DIM, BATCH_SIZE, SEQ_LEN = 2, 256, 4, 512
ROUNDS = 101
CONFIG = MoEConfig(
    num_experts=32, top_k=4, expert_dim=128, num_shared_experts=0, router=RouterConfig()
)
ROWS = BATCH_SIZE * SEQ_LEN * CONFIG.top_k  # of each rank; what each receives if all is balanced
LIMITS = (ROWS, ROWS // 4)


def build(limit: int | None, *, is_skewed: bool = False) -> MoE:
    """A layer as in `bench.step`; skewed, only the first rank's experts are chosen."""
    moe = MoE(replace(CONFIG, max_tokens_per_chunk=limit), dim=DIM, expert_group=dist.group.WORLD)
    initialise(moe, seed=0, std=0.02)
    if is_skewed:
        moe.router.bias[CONFIG.num_experts // RANKS :] = -100.0
    return moe


def step(moe: MoE, x: torch.Tensor) -> None:
    """Forward and backward."""
    counted = torch.ones(x.shape[:2], dtype=torch.bool)
    moe(x, counted).hidden.sum().backward()


def cpu_seconds(moe: MoE, x: torch.Tensor) -> float:
    """CPU time of this rank's step: unlike wall-clock time, it leaves out other processes."""
    dist.barrier()
    start = time.process_time()
    step(moe, x)
    return time.process_time() - start


def measure(rank: int) -> None:
    x = torch.randn(BATCH_SIZE, SEQ_LEN, DIM, requires_grad=True)
    say = print if rank == 0 else (lambda *_: None)
    say(
        f"{RANKS} ranks of one thread, {BATCH_SIZE} x {SEQ_LEN} tokens of width {DIM} each, fp32; "
        f"{CONFIG.num_experts} experts of {CONFIG.expert_dim}, top-{CONFIG.top_k}, none shared"
    )

    layers = {"no limit": build(None), "a limit that fits": build(2 * ROWS)}
    times: dict[str, list[float]] = {name: [] for name in layers}
    for i in range(ROUNDS + 3):
        for name in layers if i % 2 else reversed(layers):
            seconds = cpu_seconds(layers[name], x)
            if i >= 3:  # after warming up
                times[name].append(seconds)
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    for name, median in medians.items():
        say(f"balanced, {name:18}: {median * 1e3:7.1f} ms of CPU time (median of {ROUNDS})")
    pairs = zip(*times.values(), strict=True)
    ratio = statistics.median(limited / free for free, limited in pairs)
    say(f"balanced, the limit costs   : {ratio - 1:+.1%} (median of the rounds' ratios)")

    for limit in (None, *LIMITS):
        moe = build(limit, is_skewed=True)
        seconds = statistics.median(cpu_seconds(moe, x) for _ in range(5))
        moe.zero_grad()
        x.grad = None
        with LiveBytes() as live:
            step(moe, x)
        bound = ""
        if limit is not None:
            config = replace(CONFIG, max_tokens_per_chunk=limit)
            elements = routed_peak(
                config,
                dim=DIM,
                tokens=BATCH_SIZE * SEQ_LEN,
                num_local=CONFIG.num_experts // RANKS,
            )
            bound = f" (the routed experts' bound: {4 * elements / 2**20:.0f})"
        say(
            f"all for rank 0, limit {limit or 'none':>5}: {seconds * 1e3:4.0f} ms of CPU time, "
            f"{live.peak / 2**20:4.0f} MiB at the peak{bound}"
        )


def main() -> None:
    on_ranks(RANKS, measure)


if __name__ == "__main__":
    main()
