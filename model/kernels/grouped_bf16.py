"""Grouped products in BF16: each expert's run of rows with its own matrix, in one launch.

M rows sorted by expert, E experts, K the summed width, N columns. Rows belong to experts by counts
alone: no run is padded, and an expert without rows has no program (its weights' gradient is zero).
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.grouped import lay_runs
from model.kernels.grouped_outer import find_ends

ROWS, COLUMNS, DEPTH = 128, 128, 32  # of a program's product, and of one step along K
GROUP = 8  # blocks of rows that share their columns' weights in the cache


def grouped_product(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """[M, N] of rows [M, K] and weights [E, N, K]: `x w^T`, summed in fp32, in the rows' dtype."""
    outputs: Tensor = _GroupedProduct.apply(rows, weights, counts)
    return outputs


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.counts = counts
        return multiply(rows, weights, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        needs_rows, needs_weights, _ = ctx.needs_input_grad
        grad_rows = multiply(grad, weights.mT, ctx.counts) if needs_rows else None
        grad_weights = outer(grad, rows, ctx.counts, weights.dtype) if needs_weights else None
        return grad_rows, grad_weights, None


def multiply(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """[M, N] of rows [M, K] and weights [E, N, K], which may be a view of either side."""
    num_columns, depth = weights.shape[1:]
    outputs = torch.empty(len(rows), num_columns, dtype=rows.dtype, device=rows.device)
    runs = lay_runs(tuple(counts), rows.device, block_rows=ROWS)
    if not runs.num_blocks:
        return outputs
    _multiply[(runs.num_blocks * triton.cdiv(num_columns, COLUMNS),)](
        rows,
        weights,
        outputs,
        runs.table,
        runs.num_blocks,
        num_columns,
        depth,
        *rows.stride(),
        *weights.stride(),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        GROUP=GROUP,
        num_warps=8,
        num_stages=4,
    )
    return outputs


def outer(y: Tensor, x: Tensor, counts: list[int], dtype: torch.dtype) -> Tensor:
    """[E, N, K]: `y^T x` over each expert's rows of y [M, N] and x [M, K]; zeros without rows."""
    num_columns, width = y.shape[1], x.shape[1]
    total = torch.empty(len(counts), num_columns, width, dtype=dtype, device=y.device)
    _outer[(triton.cdiv(width, COLUMNS), triton.cdiv(num_columns, ROWS), len(counts))](
        y,
        x,
        total,
        find_ends(tuple(counts), y.device),
        num_columns,
        width,
        *y.stride(),
        *x.stride(),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        num_warps=8,
        num_stages=4,
    )
    return total


@triton.jit
@no_type_check
def _multiply(
    rows_ptr,
    weights_ptr,
    outputs_ptr,
    table_ptr,
    num_blocks,
    num_columns,
    depth,
    row_stride,
    row_depth_stride,
    expert_stride,
    column_stride,
    depth_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs that run side by side share GROUP blocks of rows and few of columns.
    of_group = GROUP * tl.cdiv(num_columns, COLUMNS)
    first = tl.program_id(0) // of_group * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    block = first + tl.program_id(0) % of_group % size
    column_block = tl.program_id(0) % of_group // size

    expert = tl.load(table_ptr + 3 * block).to(tl.int64)
    row = tl.load(table_ptr + 3 * block + 1).to(tl.int64) + tl.arange(0, ROWS)
    end = tl.load(table_ptr + 3 * block + 2)
    column = column_block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    has_row, has_column = row < end, column < num_columns
    weights_ptr += expert * expert_stride
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(0, depth, DEPTH):
        k = step + tl.arange(0, DEPTH)
        left = tl.load(
            rows_ptr + row[:, None] * row_stride + k[None, :] * row_depth_stride,
            mask=has_row[:, None] & (k < depth)[None, :],
            other=0.0,
        )
        right = tl.load(
            weights_ptr + k[:, None] * depth_stride + column[None, :] * column_stride,
            mask=(k < depth)[:, None] & has_column[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total)
    tl.store(
        outputs_ptr + row[:, None] * num_columns + column[None, :],
        total.to(outputs_ptr.dtype.element_ty),
        mask=has_row[:, None] & has_column[None, :],
    )


@triton.jit
@no_type_check
def _outer(
    y_ptr,
    x_ptr,
    total_ptr,
    ends_ptr,
    num_columns,
    width,
    y_row_stride,
    y_column_stride,
    x_row_stride,
    x_column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(ends_ptr + expert), tl.load(ends_ptr + expert + 1)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(start, end, DEPTH):
        row = first + tl.arange(0, DEPTH).to(tl.int64)
        has_row = row < end
        left = tl.load(
            y_ptr + n[:, None] * y_column_stride + row[None, :] * y_row_stride,
            mask=(n < num_columns)[:, None] & has_row[None, :],
            other=0.0,
        )
        right = tl.load(
            x_ptr + row[:, None] * x_row_stride + k[None, :] * x_column_stride,
            mask=has_row[:, None] & (k < width)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total)
    tl.store(
        total_ptr + (expert * num_columns + n[:, None]) * width + k[None, :],
        total.to(total_ptr.dtype.element_ty),
        mask=(n < num_columns)[:, None] & (k < width)[None, :],
    )
