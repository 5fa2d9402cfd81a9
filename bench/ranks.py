"""CPU ranks of one thread each, as processes, for what is measured between ranks."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(count: int, measure: Callable[[int], None]) -> None:
    """Call `measure`, a function of a module, on every rank with its number."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_be_rank, args=(count, str(Path(folder) / "store"), measure), nprocs=count)


def _be_rank(rank: int, count: int, store: str, measure: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count)
    torch.manual_seed(rank)
    measure(rank)
    dist.destroy_process_group()
