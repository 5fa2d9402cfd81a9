"""`python -m launch.fitness.network`: how fast the nodes exchange, pair by pair and all together.

One process per node, over the interface and with the backend that the ranks will use. Standard
input holds the questions as JSON; an answer is one line of JSON, rates in bytes per second.
"""

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.fitness.probe import mark_path

TIMEOUT = datetime.timedelta(seconds=60)
REPEATS = 3


def main() -> int:
    """Measure with the others; tell what this node sees of the shared folder."""
    asked: dict[str, Any] = json.load(sys.stdin)
    run_dir, nodes = Path(asked["run_dir"]), int(asked["nodes"])
    seen = [node for node in range(nodes) if mark_path(run_dir, asked["nonce"], node).exists()]
    answer: dict[str, Any] = {"seen": seen}
    if asked["bandwidth"] and nodes > 1:
        answer |= measure(asked)
    print(json.dumps(answer))
    return 0


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Rates between each pair of nodes and of the whole group's collectives."""
    rank, nodes = int(asked["node"]), int(asked["nodes"])
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[name] = asked["interface"]
    use_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    num_bytes = int(asked["megabytes"]) << 20
    dist.init_process_group(
        "nccl" if use_gpu else "gloo",
        init_method=f"tcp://{asked['first']}:{asked['port']}",
        rank=rank,
        world_size=nodes,
        timeout=TIMEOUT,
    )
    data = torch.zeros(num_bytes // 4 // nodes * nodes, device=device)
    other = torch.empty_like(data)
    pairs: dict[str, dict[str, float]] = {}
    for round_pairs in rounds(nodes):
        for left, right in round_pairs:
            if rank in (left, right):
                peer = right if rank == left else left
                exchange = _time(partial(_swap, data, other, peer), device)
                reduction = _time(partial(_add, data, other, peer), device)
                pairs[f"{left}-{right}"] = {
                    "all_to_all": data.nbytes / exchange,
                    "all_reduce": data.nbytes / reduction,
                }
        dist.barrier()
    gathered: list[Any] = [None] * nodes
    dist.all_gather_object(gathered, pairs)
    all_reduce = _time(lambda: dist.all_reduce(data), device)
    all_to_all = _time(lambda: dist.all_to_all_single(other, data), device)
    result = {
        "pairs": {name: rate for part in gathered for name, rate in part.items()},
        "all_reduce": data.nbytes / all_reduce,
        "all_to_all": data.nbytes / all_to_all,
    }
    dist.destroy_process_group()
    return result


def rounds(nodes: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, in rounds of pairs that don't share a node (the circle method)."""
    places = list(range(nodes + nodes % 2))  # an odd number gets an empty place
    half = len(places) // 2
    for _ in range(len(places) - 1):
        facing = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in facing if max(pair) < nodes]
        places = [places[0], places[-1], *places[1:-1]]


def _swap(data: torch.Tensor, other: torch.Tensor, peer: int) -> None:
    """Both ways at once, as all-to-all does."""
    operations = [dist.P2POp(dist.isend, data, peer), dist.P2POp(dist.irecv, other, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _add(data: torch.Tensor, other: torch.Tensor, peer: int) -> None:
    """All-reduce between two: each adds up one half, then they swap the sums."""
    half = data.numel() // 2
    mine = data[:half] if dist.get_rank() < peer else data[-half:]
    theirs = data[-half:] if dist.get_rank() < peer else data[:half]
    _swap(theirs, other[:half], peer)
    mine += other[:half]
    _swap(mine, theirs, peer)


def _time(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of a few runs."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    sys.exit(main())
