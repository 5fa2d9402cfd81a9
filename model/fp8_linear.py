"""One product and its two gradients in FP8 (arXiv:2412.19437, 3.3).

M rows, K the input's width, N the output's.
"""

from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.e5m6 import dequantise_e5m6, quantise_e5m6
from model.fp8 import Quantised, Scale, dequantise_tiles
from model.fp8_operations import operations_on


class Kept(StrEnum):
    """How a product's input waits for the backward pass."""

    e4m3 = "e4m3"  # one byte, as it was multiplied
    e5m6 = "e5m6"  # one and a half, for the input that attention's backward needs too


def linear_in_fp8(
    x: Float[Tensor, "*batch K"],
    weight: Float[Tensor, "N K"],
    *,
    kept: Kept = Kept.e4m3,
) -> Float[Tensor, "*batch N"]:
    """`x weight^T` in the input's dtype: products of E4M3, summed in fp32."""
    rows: Tensor = _Linear.apply(x.flatten(0, -2), weight, kept)
    return rows.unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Kept) -> Tensor:
        scale = _scale(kept)
        do = operations_on(x.device)
        tiles = do.quantise_tiles(x, scale)
        ctx.save_for_backward(*(quantise_e5m6(x) if kept is Kept.e5m6 else tiles), weight)
        ctx.kept = kept
        blocks = do.quantise_blocks(weight[None])
        return do.grouped_multiply(tiles, blocks, counts=[len(x)], dtype=x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        *saved, weight = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        do, counts = operations_on(grad.device), [len(grad)]
        grad_x = grad_weight = None
        if needs_x:
            grad_x = do.grouped_multiply_transposed(
                do.quantise_tiles(grad),
                do.quantise_blocks(weight[None]),
                counts=counts,
                dtype=grad.dtype,
            )
        if needs_weight:
            tiles = Quantised(*saved)
            is_e4m3 = ctx.kept is Kept.e4m3
            width = weight.shape[1]
            x = dequantise_tiles(tiles) if is_e4m3 else dequantise_e5m6(tiles, width=width)
            (grad_weight,) = do.grouped_outer(
                grad, x, counts=counts, dtype=weight.dtype, scale=_scale(ctx.kept)
            )
        return grad_x, grad_weight, None


def _scale(kept: Kept) -> Scale:
    """What is turned from rows of tiles to columns has powers of two, so as to round but once."""
    return Scale.power_of_two if kept is Kept.e5m6 else Scale.exact
