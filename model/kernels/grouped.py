"""Grouped products of FP8: each expert's run of rows with its own matrix, in one launch.

M rows sorted by expert, E experts, K the summed width, N columns. A program makes a block of one
expert's rows; an expert without rows has none, and a block's end may lie behind the run's.
"""

from functools import lru_cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import TILE, Quantised

BLOCK_ROWS = 64
BLOCK_COLUMNS = 128  # as a weight's block, so that a program's columns share their scale


class Runs(NamedTuple):
    """Where the blocks of rows lie: for each its expert, first row, and the end of its run."""

    table: Tensor  # [blocks, 3], int32
    num_blocks: int


@lru_cache(maxsize=4)  # a layer's products, one after another, ask for the same
def lay_runs(
    counts: tuple[int, ...], device: torch.device, *, block_rows: int = BLOCK_ROWS
) -> Runs:
    """The blocks of rows for experts with so many rows each; one small copy to the device."""
    blocks, start = [], 0
    for expert, count in enumerate(counts):
        end = start + count
        blocks += [(expert, first, end) for first in range(start, end, block_rows)]
        start = end
    table = torch.tensor(blocks, dtype=torch.int32).reshape(-1, 3)
    return Runs(table.to(device, non_blocking=True), len(blocks))


def grouped_multiply(
    tiles: Quantised, blocks: Quantised, *, counts: list[int], dtype: torch.dtype
) -> Tensor:
    """As `model.fp8_product.grouped_multiply`: after each 128 of K the product is scaled and added
    up in fp32 (arXiv:2412.19437, 3.3.2)."""
    rows, row_scales = (part.contiguous() for part in tiles)
    weights, weight_scales = blocks
    outputs = torch.empty(len(rows), weights.shape[1], dtype=dtype, device=rows.device)
    runs = lay_runs(tuple(counts), rows.device)
    if not runs.num_blocks:
        return outputs
    _grouped[(runs.num_blocks, triton.cdiv(outputs.shape[1], BLOCK_COLUMNS))](
        rows,
        row_scales,
        weights,
        weight_scales,
        outputs,
        runs.table,
        outputs.shape[1],
        rows.shape[1],
        *weights.stride(),
        *weight_scales.stride(),
        ROWS=BLOCK_ROWS,
        COLUMNS=BLOCK_COLUMNS,
        TILE=TILE,
        num_warps=8,
        num_stages=3,
    )
    return outputs


def grouped_multiply_transposed(
    tiles: Quantised, blocks: Quantised, *, counts: list[int], dtype: torch.dtype
) -> Tensor:
    """As `model.fp8_product.grouped_multiply_transposed`: the same kernel, which reads the matrices
    from their other side."""
    turned = Quantised(blocks.values.mT, blocks.scales.mT)
    return grouped_multiply(tiles, turned, counts=counts, dtype=dtype)


@triton.jit
@no_type_check
def _grouped(
    rows_ptr,
    row_scales_ptr,
    weights_ptr,
    weight_scales_ptr,
    outputs_ptr,
    table_ptr,
    num_columns,
    depth,
    expert_stride,
    column_stride,
    depth_stride,
    expert_scale_stride,
    column_scale_stride,
    depth_scale_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    block, column_block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(table_ptr + 3 * block).to(tl.int64)
    row = tl.load(table_ptr + 3 * block + 1).to(tl.int64) + tl.arange(0, ROWS)
    end = tl.load(table_ptr + 3 * block + 2)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_column = row < end, column < num_columns
    weights_ptr += expert * expert_stride
    weight_scales_ptr += expert * expert_scale_stride + column_block * column_scale_stride
    num_tiles = tl.cdiv(depth, TILE)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in range(num_tiles):
        k = tile * TILE + tl.arange(0, TILE)
        has_k = k < depth
        left = tl.load(
            rows_ptr + row[:, None] * depth + k[None, :],
            mask=has_row[:, None] & has_k[None, :],
            other=0.0,
        )
        right = tl.load(
            weights_ptr + k[:, None] * depth_stride + column[None, :] * column_stride,
            mask=has_k[:, None] & has_column[None, :],
            other=0.0,
        )
        of_rows = tl.load(row_scales_ptr + row * num_tiles + tile, mask=has_row, other=0.0)
        of_block = tl.load(weight_scales_ptr + tile * depth_scale_stride)
        total += tl.dot(left, right) * (of_rows * of_block)[:, None]
    tl.store(
        outputs_ptr + row[:, None] * num_columns + column[None, :],
        total.to(outputs_ptr.dtype.element_ty),
        mask=has_row[:, None] & has_column[None, :],
    )
