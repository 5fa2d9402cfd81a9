"""What the device can do at most, and how much of its memory was used."""

import resource
import time

import torch

# Dense matrix rates in FLOP/s from the vendors' data sheets (SXM parts where there are several).
KNOWN_PEAKS: dict[str, dict[torch.dtype, float]] = {
    "A100-SXM": {torch.bfloat16: 312e12, torch.float32: 19.5e12},
    "H100 80GB HBM3": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "H200": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "H800": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "L40S": {torch.bfloat16: 362e12, torch.float32: 91.6e12},
    "RTX 4090": {torch.bfloat16: 165e12, torch.float32: 82.6e12},
    "B200": {torch.bfloat16: 2250e12, torch.float32: 80e12},
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the device's matrix products: known by its name, or else measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peaks in KNOWN_PEAKS.items():
            if known in name:
                return peaks[dtype]
    return measure_matrix_rate(device, dtype)


def measure_matrix_rate(
    device: torch.device, dtype: torch.dtype, *, size: int | None = None
) -> float:
    """Best FLOP/s of a few square products, of a size that suits the device if none is given."""
    size = size or (8192 if device.type == "cuda" else 1024)
    draw = torch.Generator(device).manual_seed(0)  # equal numbers would cost a GPU less power
    a = torch.randn(size, size, device=device, generator=draw).to(dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        product = a @ a
        wait_for(device)
        best = min(best, time.perf_counter() - start)
        del product
    return 2 * size**3 / best


def measure_bandwidth(device: torch.device, *, megabytes: int = 128) -> float:
    """Best bytes/s, read and written, of a few copies too large for a cache."""
    source = torch.ones(megabytes * 2**20, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def wait_for(device: torch.device) -> None:
    """Return once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the device, or of main memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
