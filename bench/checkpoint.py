"""`python -m bench.checkpoint`: a save's stall, and loads, beside torch's own with equal bytes.

The state of a real engine: `bench.step`'s model on one rank, masters and both moments in fp32. In
turns, on one thread; CPU time leaves other processes out, the least wall-clock time is the one that
they disturbed least. Files lie in the page cache, so loads are compared as copies, not as disks.
The other layout's checkpoint is written by two ranks with the experts spread over them. Memory is
measured in fresh processes.
"""

import argparse
import math
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor

from bench.step import OURS
from tests.train.tiny import tiny_run
from train.checkpoint.checkpoints import Checkpoints, load
from train.checkpoint.integrity import CheckpointVerify
from train.checkpoint.manifest import Fragment
from train.checkpoint.saver import Saver
from train.checkpoint.snapshot import Snapshot
from train.engine.engine import Engine, join
from train.layout.parallel import ParallelConfig
from train.ranks import alone
from train.watch.agreement import hash_weights

ROUNDS, STEP = 9, 1
ABOUT: dict[str, Any] = {
    **{key: {} for key in ("progress", "layout", "versions", "config")},
    "tokenizer": "",
}
SAME, OTHER = "same layout", "resharded"
COPY, TORCH = "a copy in memory", "torch.load and a copy into place"


class Cost(NamedTuple):
    """Of one call, in seconds."""

    cpu: float  # median of all rounds
    wall: float  # least of all rounds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-"))
    try:
        mp.spawn(write_other_layout, (folder,), nprocs=2)
        measure(folder, rounds)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, rounds: int) -> None:
    engine = build(folder, ParallelConfig(micro_batch_size=4))
    fragments = list(engine.fragments())
    num_bytes = sum(one.data.nbytes for one in fragments)
    print(f"state of the rank: {num_bytes / 1e6:.0f} MB in {len(fragments)} fragments")
    report(in_turns(list_saves(folder, engine), rounds), peer=COPY)
    report(in_turns(list_loads(folder, fragments), rounds), peer=TORCH)
    for name in (SAME, OTHER):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            used = pool.apply(load_into_new_memory, (folder / name,))
        print(f"host memory of a load, {name:12}: {used / num_bytes:.3f} of the state")


def build(folder: Path, parallel: ParallelConfig) -> Engine:
    config = replace(tiny_run(folder, parallel=parallel), model=OURS)
    return Engine(config, join(parallel, timeout_minutes=5))


def write_other_layout(rank: int, folder: Path) -> None:
    """One of two ranks' share of a checkpoint."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    engine = build(folder, ParallelConfig(micro_batch_size=4, expert=2))
    checkpoints = Checkpoints(folder / OTHER)
    checkpoints.save(STEP, engine.fragments(), ranks=engine.ranks, about=ABOUT)
    dist.destroy_process_group()


class Held(Checkpoints):
    """Its saves write nothing and end when they are told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_end = threading.Event()

    def save(self, *_: Any, **__: Any) -> Any:
        self.may_end.wait()


def list_saves(folder: Path, engine: Engine) -> Mapping[str, Callable[[], object]]:
    """A copy, the stall of a save whose write is held back, and whole writes."""
    fragments = list(engine.fragments())
    target = [torch.zeros_like(one.data).add_(1) for one in fragments]  # all pages are there
    tensors = by_key(fragments)
    held, same = Held(folder / "held"), Checkpoints(folder / SAME)
    saver = Saver(held, alone(), snapshot=Snapshot(fragments))

    def copy() -> None:
        for here, one in zip(target, fragments, strict=True):
            here.copy_(one.data)

    def stall() -> None:  # and, which a step doesn't wait for, the end of a thread
        saver.start(STEP, engine.fragments(), ABOUT)
        held.may_end.set()
        saver.finish()
        held.may_end.clear()

    return {
        COPY: copy,
        "ours: the step's stall": stall,
        "ranks' self check before it": lambda: hash_weights(engine),
        "ours: all written and hashed": lambda: same.save(
            STEP, fragments, ranks=alone(), about=ABOUT
        ),
        "torch.save": lambda: torch.save(tensors, folder / "plain.pt"),
        "DCP save": lambda: dcp.save(tensors, checkpoint_id=folder / "dcp"),
    }


def list_loads(folder: Path, fragments: list[Fragment]) -> Mapping[str, Callable[[], object]]:
    """Loads of what `list_saves` has written into the engine's own storage."""
    tensors = by_key(fragments)

    def plain() -> None:
        found = torch.load(folder / "plain.pt", weights_only=True)
        for name, tensor in tensors.items():
            tensor.copy_(found[name])

    def ours(name: str, verify: CheckpointVerify) -> Callable[[], None]:
        checkpoints = Checkpoints(folder / name, verify=verify)

        def check_and_load() -> None:
            manifest = checkpoints.find_newest(alone())
            assert manifest is not None
            load(checkpoints.path(STEP), manifest, fragments)

        return check_and_load

    fast, full = CheckpointVerify.fast, CheckpointVerify.full
    return {
        TORCH: plain,
        "DCP load": lambda: dcp.load(tensors, checkpoint_id=folder / "dcp"),
        "ours, same layout, checked fast": ours(SAME, fast),
        "ours, resharded, checked fast": ours(OTHER, fast),
        "ours, same layout, all hashed": ours(SAME, full),
        "ours, resharded, all hashed": ours(OTHER, full),
    }


def by_key(fragments: list[Fragment]) -> dict[str, Tensor]:
    return {f"{one.name}@{one.start}": one.data for one in fragments}


def in_turns(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Cost]:
    """Each candidate's cost; the first round, which warms up, is left out."""
    measured: dict[str, list[Cost]] = {name: [] for name in candidates}
    for _ in range(1 + rounds):
        for name, candidate in candidates.items():
            cpu, wall = time.process_time(), time.perf_counter()
            candidate()
            cost = Cost(time.process_time() - cpu, time.perf_counter() - wall)
            measured[name].append(cost)
    return {
        name: Cost(statistics.median(c.cpu for c in costs[1:]), min(c.wall for c in costs[1:]))
        for name, costs in measured.items()
    }


def report(costs: Mapping[str, Cost], *, peer: str) -> None:
    print(f"\n{'':34} CPU time, median    least wall-clock time    (times {peer})")
    for name, (cpu, wall) in costs.items():
        print(
            f"{name:34} {cpu * 1e3:6.0f} ms {cpu / costs[peer].cpu:6.2f}    "
            f"{wall * 1e3:9.0f} ms {wall / costs[peer].wall:6.2f}"
        )


def load_into_new_memory(run_dir: Path) -> int:
    """Bytes by which this process' peak exceeds what it held before the state had memory."""
    checkpoints = Checkpoints(run_dir)
    before = read_memory("VmRSS")
    manifest = checkpoints.find_newest(alone())
    assert manifest is not None
    parts = [
        Fragment(name, stored.shape, 0, torch.empty(math.prod(stored.shape)))
        for name, stored in manifest.tensors.items()
    ]
    load(checkpoints.path(STEP), manifest, parts)
    return read_memory("VmHWM") - before


def read_memory(key: str) -> int:
    """A number of /proc/self/status, in bytes; VmHWM is the largest VmRSS so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
