"""`python -m bench.watchdog`: what the hang explainer costs a step in which nothing hangs.

Two ranks with the experts spread over both, so that every kind of wait is entered; the tests' tiny
model, whose steps are the cheapest and the share of anything else the largest, and `bench.step`'s.

CPU time only, because other processes disturb wall-clock time: of what each step's entries
(`model/whereabouts.py`) and its note at the end take within real steps; of blocks of steps with and
without them, in turns (the difference of two large numbers, so good to a percent or so at best);
and of the sign of life that is written every few seconds.
"""

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.step import OURS
from model.config import ModelConfig
from model.whereabouts import HERE, Whereabouts
from tests.train.tiny import random_batches, tiny_model, tiny_run
from train.engine.engine import Engine, join
from train.layout.parallel import ParallelConfig
from train.update import count_denominators, update
from train.watch.stall import HEARTBEATS, take_statement, write_statement
from train.watch.watchdog import Watchdog, WatchdogConfig

RANKS = 2
BLOCK = 5  # steps
BEATS = 50


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.watchdog")
    parser.add_argument("--rounds", type=int, default=100)
    folder = Path(tempfile.mkdtemp(prefix="bench-watchdog-"))
    try:
        mp.spawn(measure, (folder, parser.parse_args().rounds), nprocs=RANKS)
    finally:
        shutil.rmtree(folder)


def measure(rank: int, folder: Path, rounds: int) -> None:
    """One rank's part; the first one prints."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's, of torch 2.13
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    say: Callable[..., None] = print if rank == 0 else (lambda *_: None)
    cost, beat = entry_seconds(), beat_seconds(folder, rank)
    every = WatchdogConfig().heartbeat_seconds
    say(
        f"an entry in a loop: {cost * 1e6:.2f} us; a sign of life: {beat * 1e3:.2f} ms of CPU time,"
    )
    say(f"  every {every:g} s: {beat / every:.3%} of a core")
    for name, model, share in (("tiny", tiny_model(), 1), ("bench.step's", OURS, 10)):
        take_block = prepare(folder / name, model, rank)
        say(f"{name} model, per step and rank:")
        say(f"  {time_entries(take_block, blocks=max(rounds // share, 5))}")
        times = in_turns(take_block, folder, max(rounds // share, 5))
        ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
        say(f"  with and without in turns: {ratio - 1:+.2%} (median of the rounds' ratios)")
    dist.destroy_process_group()


def prepare(folder: Path, model: ModelConfig, rank: int) -> Callable[[Watchdog | None], None]:
    """A block of steps of a real engine."""
    parallel = ParallelConfig(micro_batch_size=4, expert=RANKS)
    config = replace(tiny_run(folder, parallel=parallel), model=model)
    ranks = join(parallel, timeout_minutes=5)
    engine = Engine(config, ranks)
    batches = random_batches(0, rank=rank, num_ranks=RANKS, micro_batch_size=4)

    def take_block(watchdog: Watchdog | None) -> None:
        for step in range(BLOCK):
            over = count_denominators(batches, model, ranks)
            update(engine, batches, over, config=model, lr=1e-4)
            if watchdog is not None:
                watchdog.note_step(step)

    return take_block


def in_turns(
    take_block: Callable[[Watchdog | None], None], folder: Path, rounds: int
) -> dict[str, list[float]]:
    """CPU seconds of this rank's blocks; two rounds warm up."""
    ranks = join(ParallelConfig(micro_batch_size=4, expert=RANKS), timeout_minutes=5)
    times: dict[str, list[float]] = {"with": [], "without": []}
    with Watchdog(WatchdogConfig(), run_dir=folder, ranks=ranks) as watchdog:
        for number in range(rounds + 2):
            for name in times if number % 2 else reversed(times):
                dist.barrier()
                context = nullcontext() if name == "with" else unnoticed()
                start = time.process_time()
                with context:
                    take_block(watchdog if name == "with" else None)
                if number >= 2:
                    times[name].append(time.process_time() - start)
    return times


def unnoticed() -> Any:
    """While entered, waits are not entered in `HERE`."""
    nothing = nullcontext()

    def doing(*_: Any, **__: Any) -> Any:
        return nothing

    return mock.patch.object(Whereabouts, "doing", doing)


def time_entries(take_block: Callable[[Watchdog | None], None], *, blocks: int) -> str:
    """At most what the entries take where they stand: the clocks' own time, after a wait with cold
    caches, is in it, and is the larger part."""
    enter = Whereabouts.doing
    seconds: list[float] = []

    @contextmanager
    def doing(*arguments: Any, **details: Any) -> Iterator[None]:
        start = time.thread_time()
        entry = enter(*arguments, **details)
        entry.__enter__()
        entered = time.thread_time()
        try:
            yield
        finally:
            leaving = time.thread_time()
            entry.__exit__(None, None, None)
            seconds.append(entered - start + time.thread_time() - leaving)

    take_block(None)
    whole = time.process_time()
    for _ in range(blocks):
        take_block(None)
    whole = time.process_time() - whole
    with mock.patch.object(Whereabouts, "doing", doing):
        for _ in range(blocks):
            take_block(None)
    steps, mean = blocks * BLOCK, statistics.mean(seconds)
    return (
        f"{len(seconds) / steps:.0f} entries in {whole / steps * 1e3:.1f} ms of CPU time, each at "
        f"most {mean * 1e6:.1f} us: at most {sum(seconds) / whole:.2%} in all"
    )


def entry_seconds(repeats: int = 100_000) -> float:
    start = time.process_time()
    for _ in range(repeats):
        with HERE.doing("dispatch", "layers.1.ffn", sent=1, received=2):
            pass
    return (time.process_time() - start) / repeats


def beat_seconds(folder: Path, rank: int) -> float:
    start = time.process_time()
    for _ in range(BEATS):
        write_statement(folder / HEARTBEATS, take_statement(rank, with_stacks=False))
    return (time.process_time() - start) / BEATS


if __name__ == "__main__":
    main()
