"""Tests on several ranks: a function runs in forked processes that share a gloo group.

A fork takes a tenth of a second, where a fresh process would import torch for three. Forked
children keep to one thread: OpenMP's pool does not survive a fork.
"""

import faulthandler
import functools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")


def ranks(num_ranks: int, *, seconds: float = 300) -> Callable[[Callable[P, T]], Callable[P, None]]:
    """The decorated test runs on `num_ranks` ranks and passes when it passes on every one.

    Fixtures and parameters arrive as in any test. `seconds` is the limit for each rank.
    """

    def decorate(test: Callable[P, T]) -> Callable[P, None]:
        @functools.wraps(test)
        def on_ranks(*args: P.args, **kwargs: P.kwargs) -> None:
            run_ranks(num_ranks, functools.partial(test, *args, **kwargs), seconds=seconds)

        return on_ranks

    return decorate


def run_ranks(num_ranks: int, function: Callable[[], T], *, seconds: float = 300) -> list[T]:
    """What `function()` returns on each rank, in order of ranks (anything `torch.save` takes).

    Inside it `torch.distributed` is ready and RANK, LOCAL_RANK and WORLD_SIZE are set. Raises
    AssertionError with the traceback of every rank that failed, the first to fail first; a rank
    that takes longer than `seconds` is ended, and the traceback tells where it stood.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_run, args=(function, rank, num_ranks, folder, seconds))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds + 5  # the ranks' own limit strikes first
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            failures = sorted(folder.glob("*.failure"), key=lambda path: path.stat().st_mtime_ns)
            tracebacks = [f"{path.stem}:\n{path.read_text()}" for path in failures]
            raise AssertionError("\n".join([f"exit codes of the ranks: {codes}", *tracebacks]))
        results = [folder / f"{rank}.result" for rank in range(num_ranks)]
        return [torch.load(path, weights_only=False) for path in results]


def _run(
    function: Callable[[], Any], rank: int, num_ranks: int, folder: Path, seconds: float
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    with (folder / f"rank {rank}.failure").open("w") as failure:
        faulthandler.dump_traceback_later(seconds, exit=True, file=failure)
        try:
            store = dist.FileStore(str(folder / "store"), num_ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
            torch.save(function(), folder / f"{rank}.result")
            dist.barrier()
        except BaseException:
            failure.write(traceback.format_exc())
            raise SystemExit(1) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
        dist.destroy_process_group()
