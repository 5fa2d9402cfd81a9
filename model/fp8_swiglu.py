"""Grouped SwiGLU in FP8: each expert's rows through its own network (arXiv:2412.19437, 3.3).

N rows sorted by expert, E experts, D model width, F an expert's inner width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fp8 import Quantised, Scale, dequantise_tiles, quantise_blocks, quantise_tiles
from model.fp8_product import grouped_multiply, grouped_multiply_transposed, grouped_outer


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
        x = quantise_tiles(rows, Scale.power_of_two)
        gated, upped = (
            grouped_multiply(x, quantise_blocks(weight), counts=counts, dtype=rows.dtype)
            for weight in (gate, up)
        )
        inner = quantise_tiles(F.silu(gated) * upped)
        kept = (*x, *quantise_tiles(gated), *quantise_tiles(upped))
        ctx.save_for_backward(*kept, gate, up, down)
        ctx.counts = counts
        return grouped_multiply(inner, quantise_blocks(down), counts=counts, dtype=rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, gate, up, down = ctx.saved_tensors
        counts = ctx.counts
        x, gated, upped = (
            dequantise_tiles(Quantised(*pair)) for pair in (kept[0:2], kept[2:4], kept[4:6])
        )
        activated = F.silu(gated)
        arrived = quantise_tiles(grad, Scale.power_of_two)
        d_inner = grouped_multiply_transposed(
            arrived, quantise_blocks(down), counts=counts, dtype=torch.float32
        )
        d_gated = torch.ops.aten.silu_backward(d_inner * upped, gated)
        d_upped = d_inner * activated
        grad_rows, further = (
            grouped_multiply_transposed(
                quantise_tiles(d), quantise_blocks(weight), counts=counts, dtype=torch.float32
            )
            for d, weight in ((d_gated, gate), (d_upped, up))
        )
        grad_weights = (
            grouped_outer(y, of, counts=counts, dtype=weight.dtype, scale=Scale.power_of_two)
            for y, of, weight in (
                (d_gated, x, gate),
                (d_upped, x, up),
                (dequantise_tiles(arrived), activated * upped, down),
            )
        )
        return grad_rows.add_(further).to(grad.dtype), *grad_weights, None
