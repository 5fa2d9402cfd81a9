"""FP8 products with one matrix by torch's blockwise `scaled_mm` (cuBLASLt), on Hopper.

M rows, K the summed width, N columns. Layouts as torch asks for them (pytorch 2.11,
aten/src/ATen/native/cuda/ScaledBlas.cpp, `_scaled_block1x128_block128x128`): the matrix's values
with K running fastest, scales of tiles with rows running fastest, scales of blocks with K running
fastest and padded to fours. Experts' products and weights' gradients stay with the kernels here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import Quantised
from model.fp8_operations import Operations
from model.kernels.library_products import take_products


def take_scaled_mm(others: Operations) -> Operations:
    """`others`, but for products with one matrix, of widths that are multiples of 128, in BF16."""

    def product(tiles: Quantised, blocks: Quantised, _counts: list[int]) -> Tensor:
        return scaled_product(tiles, Quantised(blocks.values[0], blocks.scales[0]))

    return take_products(others, product, most_experts=1)


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
