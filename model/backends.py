"""Which implementation each operation takes on a device, and why: one table, shown at the start."""

from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

FP8_CAPABILITY = (8, 9)  # Ada and Hopper: the first with products of E4M3
UNUSED = {  # libraries that do such work elsewhere, and for which nothing is written here yet
    "deep_gemm": "FP8 products",
    "flash_attn": "attention",
    "deep_ep": "dispatch",
}


class Backend(StrEnum):
    reference = "reference"  # plain PyTorch, which the others must equal
    torch = "torch"
    triton = "triton"


class Choice(NamedTuple):
    operation: str
    backend: Backend
    why: str


def choose_all(
    device: torch.device, dtype: torch.dtype, *, is_fp8: bool, has_experts: bool
) -> list[Choice]:
    """Every operation that has more than one implementation, or might have."""
    choices = [choose_fp8(device)] if is_fp8 else []
    if has_experts and not is_fp8:
        choices.append(choose_experts(device, dtype))
    is_short = device.type == "cuda" and dtype.itemsize == 2
    inside = "varlen_attn" if is_short else "once for each of their lengths"
    choices += [
        Choice("attention", Backend.torch, f"scaled_dot_product_attention; in documents {inside}"),
        Choice("loss", Backend.reference, "in slices; linear_cross_entropy: python -m bench.loss"),
    ]
    if has_experts:
        choices.append(Choice("dispatch", Backend.torch, "all_to_all_single, uneven splits"))
    return choices


@cache
def choose_fp8(device: torch.device) -> Choice:
    """Quantisation and products of FP8."""
    operation = "FP8"
    if device.type != "cuda":
        return Choice(operation, Backend.reference, f"no kernels for {device.type}")
    if torch.version.hip is not None:
        return Choice(operation, Backend.reference, "kernels are for CUDA: AMD's E4M3 is another")
    capability = torch.cuda.get_device_capability(device)
    found = f"sm{capability[0]}{capability[1]}"
    if capability < FP8_CAPABILITY:
        return Choice(operation, Backend.reference, f"{found} has no FP8 products, sm89 has")
    if find_spec("triton") is None:
        return Choice(operation, Backend.reference, "triton is not installed")
    return Choice(operation, Backend.triton, f"{found}: model/kernels")


def choose_experts(device: torch.device, dtype: torch.dtype) -> Choice:
    """The experts' products without FP8."""
    operation = "experts"
    if device.type != "cuda":
        return Choice(operation, Backend.reference, "a loop keeps an expert's rows in the cache")
    if dtype != torch.bfloat16:
        return Choice(operation, Backend.reference, f"grouped_mm takes BF16 only, not {dtype}")
    return Choice(operation, Backend.torch, "grouped_mm: one kernel for all experts")


def describe(choices: list[Choice]) -> str:
    """A line for each; and for libraries that are there, but not used."""
    lines = [f"  {one.operation:10} {one.backend:10} {one.why}" for one in choices]
    lines += [
        f"  {operation:10} {'':10} {library} is installed, but not used here"
        for library, operation in UNUSED.items()
        if find_spec(library) is not None
    ]
    return "\n".join(lines)
