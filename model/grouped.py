"""Grouped matrix product: each expert's rows times its own matrix.

N rows sorted by expert, E experts, I and O the widths in and out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_product(
    rows: Float[Tensor, "N I"], weights: Float[Tensor, "E O I"], counts: list[int]
) -> Float[Tensor, "N O"]:
    """`rows @ weights[e].T` for each expert's run of rows; `counts` sum to N.

    An expert without rows still takes part: its weights get a gradient of zeros, never none,
    which ZeRO relies on. On GPUs torch's `grouped_mm` does it in one kernel (BF16 only); on the
    CPU a loop over segments into one buffer is as fast (`python -m bench.grouped`).
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        ends = torch.tensor(counts, device=rows.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    product: Tensor = _SegmentProduct.apply(rows, weights, counts)
    return product


class _SegmentProduct(torch.autograd.Function):
    """The loop over segments, forward and backward, each into one preallocated buffer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.counts = counts
        out = rows.new_empty(rows.shape[0], weights.shape[1])
        for mine, weight, result in zip(
            rows.split(counts), weights, out.split(counts), strict=True
        ):
            torch.mm(mine, weight.t(), out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
        for mine, weight, grad, grad_mine, grad_weight in zip(
            rows.split(ctx.counts),
            weights,
            grad_out.split(ctx.counts),
            grad_rows.split(ctx.counts),
            grad_weights,
            strict=True,
        ):
            torch.mm(grad, weight, out=grad_mine)
            torch.mm(grad.t(), mine, out=grad_weight)
        return grad_rows, grad_weights, None
