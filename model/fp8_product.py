"""Products of FP8 operands with fp32 sums (arXiv:2412.19437, 3.3.2), by experts.

M rows sorted by expert, K summed width, N columns, E experts with `counts` rows each. This is the
reference: the operands' exact values, multiplied in fp32. What a GPU does is in `model/kernels`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from model.fp8 import Quantised, Scale, dequantise_blocks, dequantise_tiles, quantise_tiles


def grouped_multiply(
    tiles: Quantised, blocks: Quantised, *, counts: list[int], dtype: torch.dtype
) -> Float[Tensor, "M N"]:
    """`x weight^T` of an expert's tiles [m, K] and blocks [N, K]: the forward pass."""
    return _by_expert(dequantise_tiles(tiles), dequantise_blocks(blocks).mT, counts, dtype)


def grouped_multiply_transposed(
    tiles: Quantised, blocks: Quantised, *, counts: list[int], dtype: torch.dtype
) -> Float[Tensor, "M K"]:
    """`y weight` of an expert's tiles [m, N] and blocks [N, K]: the input's gradient."""
    return _by_expert(dequantise_tiles(tiles), dequantise_blocks(blocks), counts, dtype)


def grouped_outer(
    y: Float[Tensor, "M N"],
    x: Float[Tensor, "M K"],
    *,
    counts: list[int],
    dtype: torch.dtype,
    scale: Scale = Scale.exact,
) -> Float[Tensor, "E N K"]:
    """`y^T x` of an expert's rows, the weight's gradient; zeros for an expert without rows.

    Rows are what is summed, so tiles are of 128 rows here: both operands are quantised anew, in
    that direction. No tile reaches over a border between experts.
    """
    total = y.new_zeros(len(counts), y.shape[1], x.shape[1], dtype=dtype)
    for mine, *sides in zip(total, y.split(counts), x.split(counts), strict=True):
        if len(sides[0]):
            left, right = (dequantise_tiles(quantise_tiles(side.t(), scale)) for side in sides)
            mine.copy_(left @ right.t())
    return total


def _by_expert(rows: Tensor, matrices: Tensor, counts: list[int], dtype: torch.dtype) -> Tensor:
    products = rows.new_empty(rows.shape[0], matrices.shape[2])
    of_experts = (rows.split(counts), matrices, products.split(counts))
    for x, matrix, y in zip(*of_experts, strict=True):
        torch.mm(x, matrix, out=y)
    return products.to(dtype)
