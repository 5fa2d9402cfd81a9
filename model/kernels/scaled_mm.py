"""FP8 products with one matrix by torch's blockwise `scaled_mm` (cuBLASLt), on Hopper.

M rows, K the summed width, N columns. Layouts as torch asks for them (pytorch 2.11,
aten/src/ATen/native/cuda/ScaledBlas.cpp, `_scaled_block1x128_block128x128`): the matrix's values
with K running fastest, scales of tiles with rows running fastest, scales of blocks with K running
fastest and padded to fours. Experts' products and weights' gradients stay with the kernels here.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import TILE, Quantised
from model.fp8_operations import Operations


def take_scaled_mm(others: Operations) -> Operations:
    """`others`, but for products with one matrix, of widths that are multiples of 128, in BF16."""
    return others._replace(
        grouped_multiply=partial(_multiply, others),
        grouped_multiply_transposed=partial(_multiply_transposed, others),
    )


def _multiply(others: Operations, tiles: Quantised, blocks: Quantised, **how: Any) -> Tensor:
    if not _can_take(blocks, **how):
        return others.grouped_multiply(tiles, blocks, **how)
    return scaled_product(tiles, Quantised(blocks.values[0], blocks.scales[0]))


def _multiply_transposed(
    others: Operations, tiles: Quantised, blocks: Quantised, **how: Any
) -> Tensor:
    if not _can_take(blocks, **how):
        return others.grouped_multiply_transposed(tiles, blocks, **how)
    turned = (part[0].t().contiguous() for part in blocks)  # a copy of one byte a weight
    return scaled_product(tiles, Quantised(*turned))


def _can_take(blocks: Quantised, *, counts: list[int], dtype: torch.dtype) -> bool:
    has_whole_blocks = all(width % TILE == 0 for width in blocks.values.shape[1:])
    return len(counts) == 1 and counts[0] > 0 and has_whole_blocks and dtype == torch.bfloat16


def scaled_product(tiles: Quantised, blocks: Quantised) -> Tensor:
    """`x w^T` in BF16 of tiles [M, K] and blocks [N, K]."""
    of_rows = tiles.scales.t().clone(memory_format=torch.contiguous_format)
    of_blocks = F.pad(blocks.scales, (0, -blocks.scales.shape[1] % 4))
    return F.scaled_mm(
        tiles.values.contiguous(),
        blocks.values.t(),
        of_rows.t(),
        F.ScalingType.BlockWise1x128,
        of_blocks.t(),
        F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
