"""Times beside the least that their work takes on this machine, as measured in the same run."""

from collections.abc import Iterator

import torch

from bench.sizes import Case, layer_cases
from train.hardware import measure_bandwidth, measure_matrix_rate
from train.profile.report import Floors
from train.profile.work import Work


def measure_floors(device: torch.device, dtype: torch.dtype) -> Floors:
    """The machine's rates now, printed."""
    floors = Floors(measure_matrix_rate(device, dtype), measure_bandwidth(device))
    print(
        f"floors in {name(dtype)}: {floors.flops / 1e9:,.0f} GFLOP/s in matrix products, "
        f"{floors.bytes / 1e9:,.1f} GB/s in copies"
    )
    return floors


def cases_and_floors(device: torch.device) -> Iterator[tuple[Case, Floors]]:
    """What single layers are measured in, and the machine's rates in those numbers."""
    floors: dict[torch.dtype, Floors] = {}
    for case in layer_cases(device):
        if case.dtype not in floors:
            floors[case.dtype] = measure_floors(device, case.dtype)
        yield case, floors[case.dtype]


def describe(seconds: float, work: Work, floors: Floors) -> str:
    """The time, the rates at which the work was done, and the least time's share of it."""
    told = [f"{seconds * 1e3:.2f} ms"]
    if work.flops:
        told.append(f"{work.flops / seconds / 1e9:,.1f} GFLOP/s")
    if work.bytes:
        told.append(f"{work.bytes / seconds / 1e9:,.1f} GB/s")
    told.append(f"{floors.least_seconds(work) / seconds:.0%} of the floor")
    return ", ".join(told)


def name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "BF16"}[dtype]
