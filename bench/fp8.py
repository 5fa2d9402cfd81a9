"""`python -m bench.fp8`: quantisation against a copy, and an MoE layer in FP8 against BF16.

On a GPU the layer has DeepSeek-V2-Lite's and V3's widths (as many experts as fit one device), with
forced balance; on the CPU, where FP8 is emulated, small ones.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.rows import Row, note
from bench.timing import median_seconds, prepare
from model.backends import choose_fp8
from model.fp8 import Scale, quantise_blocks, quantise_tiles
from model.fp8_operations import operations_on
from model.fp8_swiglu import grouped_swiglu_in_fp8
from model.grouped import grouped_swiglu
from train.hardware import measure_matrix_rate

ROUNDS = 11


class Shape(NamedTuple):
    name: str
    rows: int  # choices: tokens times experts per token
    experts: int
    dim: int
    inner_dim: int


ON_GPU = (
    Shape("V2-Lite", 6 * 8192, 64, 2048, 1408),
    Shape("V3, 32 of 256 experts", 8 * 4096, 32, 7168, 2048),
)
ON_CPU = (Shape("small", 2048, 16, 256, 128),)


def main() -> None:
    device = prepare()
    print(f"FP8: {choose_fp8(device).backend}, {choose_fp8(device).why}")
    size = 8192 if device.type == "cuda" else 1024
    rate = measure_matrix_rate(device, torch.bfloat16, size=size)
    for shape in ON_GPU if device.type == "cuda" else ON_CPU:
        time_quantisation(shape, device)
        time_experts(shape, device, rate)


def time_quantisation(shape: Shape, device: torch.device) -> None:
    """Bytes read and written per second, beside those of a copy of the same tensor."""
    x = torch.randn(shape.rows, shape.dim, device=device, dtype=torch.bfloat16)
    weight = torch.randn(shape.inner_dim, shape.dim, device=device, dtype=torch.bfloat16)
    do = operations_on(device)
    moved = {"copy": 2 * x.nbytes}
    candidates: dict[str, Callable[[], object]] = {"copy": x.clone}
    for name, tensor, quantise in (
        ("tiles", x, do.quantise_tiles),
        ("tiles of columns", x, lambda x: do.quantise_tiles(x.t(), Scale.power_of_two)),
        ("tiles, plain", x, quantise_tiles),
        ("blocks", weight, quantise_blocks),
    ):
        moved[name] = tensor.nbytes + tensor.numel()
        candidates[name] = partial(quantise, tensor)
    rates = {
        name: moved[name] / duration
        for name, duration in median_seconds(candidates, rounds=ROUNDS).items()
    }
    for name, bytes_per_second in rates.items():
        share = bytes_per_second / rates["copy"]
        note(
            Row(
                f"quantisation, {shape.name}: {name}",
                f"{bytes_per_second / 1e9:.1f} GB/s",
                f"a copy: {rates['copy'] / 1e9:.1f} GB/s",
                f"{share:.0%} of a copy",
            )
        )


def time_experts(shape: Shape, device: torch.device, rate: float) -> None:
    """Forward and backward of the routed experts; FLOP/s beside the measured BF16 matrix rate."""
    rows, experts, dim, inner_dim = shape[1:]
    shapes = [(rows, dim), *[(experts, inner_dim, dim)] * 2, (experts, dim, inner_dim)]
    inputs = [
        torch.randn(one, device=device, dtype=torch.bfloat16).div_(dim**0.5).requires_grad_()
        for one in shapes
    ]
    upstream = torch.randn_like(inputs[0])
    counts = [rows // experts] * experts
    passes = {
        "BF16": partial(_pass, grouped_swiglu, inputs, counts, upstream),
        "FP8": partial(_pass, grouped_swiglu_in_fp8, inputs, counts, upstream),
    }
    medians = median_seconds(passes, rounds=ROUNDS)
    flops = 3 * 2 * 3 * rows * dim * inner_dim
    for name, duration in medians.items():
        note(
            Row(
                f"routed experts forward and backward, {shape.name}: {name}",
                f"{duration * 1e3:.2f} ms, {flops / duration / 1e9:.1f} GFLOP/s, "
                f"{flops / duration / rate:.0%} of the BF16 matrix rate",
                f"BF16: {medians['BF16'] * 1e3:.2f} ms",
                f"{medians['BF16'] / duration:.2f} times BF16",
            )
        )


def _pass(
    experts: Callable[..., Tensor], inputs: list[Tensor], counts: list[int], upstream: Tensor
) -> None:
    torch.autograd.grad(experts(*inputs, counts=counts), inputs, upstream)


if __name__ == "__main__":
    main()
