"""Products of FP8 operands with fp32 sums (arXiv:2412.19437, 3.3.2), plain and by experts.

M rows, K summed width, N columns, E experts with `counts` rows each. This is the reference: the
operands' exact values, multiplied in fp32. What a GPU does instead is in `model/kernels`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from model.fp8 import Quantised, Scale, dequantise_blocks, dequantise_tiles, quantise_tiles


def multiply(tiles: Quantised, blocks: Quantised, *, dtype: torch.dtype) -> Float[Tensor, "M N"]:
    """`x weight^T` of tiles [M, K] and blocks [N, K]: the forward pass."""
    return (dequantise_tiles(tiles) @ dequantise_blocks(blocks).t()).to(dtype)


def multiply_transposed(
    tiles: Quantised, blocks: Quantised, *, dtype: torch.dtype
) -> Float[Tensor, "M K"]:
    """`y weight` of tiles [M, N] and blocks [N, K]: the input's gradient."""
    return (dequantise_tiles(tiles) @ dequantise_blocks(blocks)).to(dtype)


def outer(
    y: Float[Tensor, "M N"],
    x: Float[Tensor, "M K"],
    *,
    dtype: torch.dtype,
    scale: Scale = Scale.exact,
) -> Float[Tensor, "N K"]:
    """`y^T x`, the weight's gradient. Rows are what is summed, so tiles are of 128 rows here:
    both operands are quantised anew, in that direction."""
    left, right = (quantise_tiles(side.t(), scale) for side in (y, x))
    return (dequantise_tiles(left) @ dequantise_tiles(right).t()).to(dtype)


def grouped_multiply(
    tiles: Quantised, blocks: Quantised, *, counts: list[int], dtype: torch.dtype
) -> Float[Tensor, "M N"]:
    """`multiply` for each expert's run of rows, with its own matrix of blocks [E, N, K]."""
    return _by_expert(dequantise_tiles(tiles), dequantise_blocks(blocks).mT, counts, dtype)


def grouped_multiply_transposed(
    tiles: Quantised, blocks: Quantised, *, counts: list[int], dtype: torch.dtype
) -> Float[Tensor, "M K"]:
    """`multiply_transposed` for each expert's run of rows."""
    return _by_expert(dequantise_tiles(tiles), dequantise_blocks(blocks), counts, dtype)


def grouped_outer(
    y: Float[Tensor, "M N"],
    x: Float[Tensor, "M K"],
    *,
    counts: list[int],
    dtype: torch.dtype,
    scale: Scale = Scale.exact,
) -> Float[Tensor, "E N K"]:
    """`outer` for each expert's run of rows: no tile reaches over a border between experts.

    An expert without rows gets zeros.
    """
    total = y.new_zeros(len(counts), y.shape[1], x.shape[1], dtype=dtype)
    for mine, left, right in zip(total, y.split(counts), x.split(counts), strict=True):
        if len(left):
            mine.copy_(outer(left, right, dtype=dtype, scale=scale))
    return total


def _by_expert(rows: Tensor, matrices: Tensor, counts: list[int], dtype: torch.dtype) -> Tensor:
    products = rows.new_empty(rows.shape[0], matrices.shape[2])
    of_experts = (rows.split(counts), matrices, products.split(counts))
    for x, matrix, y in zip(*of_experts, strict=True):
        torch.mm(x, matrix, out=y)
    return products.to(dtype)
