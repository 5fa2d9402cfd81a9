"""Times of alternatives, taken in turns: a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

THREADS = 2


def prepare() -> torch.device:
    """The device to measure on; on the CPU, torch keeps to THREADS threads."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def median_seconds(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_ups: int = 2,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, float]:
    """Median time of one call of each by a clock (None: `seconds`); every round calls each once."""
    clock = clock or seconds
    for candidate in candidates.values():
        for _ in range(warm_ups):
            clock(candidate)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            times[name].append(clock(candidate))
    return {name: statistics.median(measured) for name, measured in times.items()}


def seconds(candidate: Callable[[], object]) -> float:
    """Wall-clock time of one call, until the device is done."""
    start = time.perf_counter()
    candidate()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cpu_seconds(candidate: Callable[[], object]) -> float:
    """CPU time of one call, over all threads: what others do on the machine hardly enters."""
    start = time.process_time()
    candidate()
    return time.process_time() - start
