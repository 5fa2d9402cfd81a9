"""FP8 products by a library where it can take them; the rest stays with other operations.

M rows sorted by expert, E experts, K the summed width, N columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.fp8 import TILE, Quantised
from model.fp8_operations import Operations

Product = Callable[[Quantised, Quantised, list[int]], Tensor]
"""`x w^T` in BF16 [M, N] of tiles [M, K], blocks [E, N, K] and each expert's rows."""


def take_products(others: Operations, product: Product, *, most_experts: int | None) -> Operations:
    """`others`, but `product` for BF16, widths that are multiples of 128, some row, and at most so
    many experts (None: any number)."""

    def can_take(blocks: Quantised, *, counts: list[int], dtype: torch.dtype) -> bool:
        has_whole_blocks = all(width % TILE == 0 for width in blocks.values.shape[1:])
        is_of_experts = most_experts is None or len(counts) <= most_experts
        return has_whole_blocks and is_of_experts and sum(counts) > 0 and dtype == torch.bfloat16

    def multiply(tiles: Quantised, blocks: Quantised, **how: Any) -> Tensor:
        if not can_take(blocks, **how):
            return others.grouped_multiply(tiles, blocks, **how)
        return product(tiles, blocks, how["counts"])

    def multiply_transposed(tiles: Quantised, blocks: Quantised, **how: Any) -> Tensor:
        if not can_take(blocks, **how):
            return others.grouped_multiply_transposed(tiles, blocks, **how)
        turned = Quantised(*(part.mT.contiguous() for part in blocks))  # Hopper takes no other side
        return product(tiles, turned, how["counts"])

    return others._replace(
        grouped_multiply=multiply, grouped_multiply_transposed=multiply_transposed
    )
