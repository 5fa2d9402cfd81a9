"""Grouped SwiGLU in FP8: each expert's rows through its own network (arXiv:2412.19437, 3.3).

N rows sorted by expert, E experts, D model width, F an expert's inner width.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fp8 import Quantised, Scale, dequantise_tiles
from model.fp8_operations import operations_on


def grouped_swiglu_in_fp8(
    rows: Float[Tensor, "N D"],
    gate: Float[Tensor, "E F D"],
    up: Float[Tensor, "E F D"],
    down: Float[Tensor, "E D F"],
    *,
    counts: list[int],
) -> Float[Tensor, "N D"]:
    """`down (silu(gate x) * up x)`, all products of E4M3 summed in fp32.

    Kept for the backward pass, in E4M3: the rows, and SwiGLU's two inputs, from which its result is
    computed again. Rows, and the gradient that arrives, have powers of two for scales: where they
    have travelled in FP8 (`model/wire.py`), the result is the same as if they had not.
    """
    outputs: Tensor = _GroupedSwiGLU.apply(rows, gate, up, down, counts)
    return outputs


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: list[int]
    ) -> Tensor:
        do = operations_on(rows.device)
        x = do.quantise_tiles(rows, Scale.power_of_two)
        gated, upped = (
            do.grouped_multiply(x, do.quantise_blocks(weight), counts=counts, dtype=rows.dtype)
            for weight in (gate, up)
        )
        inner = do.swiglu_into_tiles(gated, upped)
        kept = (*x, *do.quantise_tiles(gated), *do.quantise_tiles(upped))
        ctx.save_for_backward(*kept, gate, up, down)
        ctx.counts = counts
        return do.grouped_multiply(inner, do.quantise_blocks(down), counts=counts, dtype=rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, gate, up, down = ctx.saved_tensors
        do, counts = operations_on(grad.device), ctx.counts
        tiles, gated, upped = (Quantised(*pair) for pair in (kept[0:2], kept[2:4], kept[4:6]))
        arrived = do.quantise_tiles(grad, Scale.power_of_two)
        d_inner = do.grouped_multiply_transposed(
            arrived, do.quantise_blocks(down), counts=counts, dtype=grad.dtype
        )
        inner, d_gated, d_upped = do.swiglu_backward(d_inner, gated, upped, dtype=grad.dtype)
        grad_rows, further = (
            do.grouped_multiply_transposed(
                do.quantise_tiles(d), do.quantise_blocks(weight), counts=counts, dtype=torch.float32
            )
            for d, weight in ((d_gated, gate), (d_upped, up))
        )
        x = dequantise_tiles(tiles)
        grad_weights = (
            do.grouped_outer(y, of, counts=counts, dtype=weight.dtype, scale=Scale.power_of_two)
            for y, of, weight in (
                (d_gated, x, gate),
                (d_upped, x, up),
                (dequantise_tiles(arrived), inner, down),
            )
        )
        return grad_rows.add_(further).to(grad.dtype), *grad_weights, None
