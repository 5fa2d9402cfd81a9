"""Weights' gradients of experts in FP8: `y^T x` over each expert's rows, in one launch.

M rows sorted by expert, E experts, N and K the widths of y and x. Rows are what is summed, so
tiles are of 128 rows; they are quantised on the way, and never written.
"""

from functools import lru_cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import TILE, Scale
from model.kernels.e4m3 import choose_scale, encode

BLOCK = 64  # columns of either side in a program


def grouped_outer(
    y: Tensor, x: Tensor, *, counts: list[int], dtype: torch.dtype, scale: Scale = Scale.exact
) -> Tensor:
    """As `model.fp8_product.grouped_outer`: [E, N, K] of y [M, N] and x [M, K]."""
    num_columns, width = y.shape[1], x.shape[1]
    total = torch.empty(len(counts), num_columns, width, dtype=dtype, device=y.device)
    grid = (triton.cdiv(num_columns, BLOCK), triton.cdiv(width, BLOCK), len(counts))
    _outer[grid](
        y,
        x,
        total,
        find_ends(tuple(counts), y.device),
        num_columns,
        width,
        *y.stride(),
        *x.stride(),
        BLOCK=BLOCK,
        TILE=TILE,
        POWER_OF_TWO=scale is Scale.power_of_two,
        num_warps=8,
    )
    return total


@lru_cache(maxsize=4)  # a layer's three gradients ask for the same
def find_ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each expert's rows begin, and the last one's end."""
    ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)


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
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.load(ends_ptr + expert), tl.load(ends_ptr + expert + 1)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for first in range(start, end, TILE):
        row = first + tl.arange(0, TILE).to(tl.int64)
        has_row = row < end
        y = tl.load(
            y_ptr + n[:, None] * y_column_stride + row[None, :] * y_row_stride,
            mask=(n < num_columns)[:, None] & has_row[None, :],
            other=0.0,
        ).to(tl.float32)
        x = tl.load(
            x_ptr + row[:, None] * x_row_stride + k[None, :] * x_column_stride,
            mask=has_row[:, None] & (k < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        y_scale = _scale(y, 1, POWER_OF_TWO)
        x_scale = _scale(x, 0, POWER_OF_TWO)
        left = encode(tl.div_rn(y, y_scale[:, None])).to(tl.float8e4nv, bitcast=True)
        right = encode(tl.div_rn(x, x_scale[None, :])).to(tl.float8e4nv, bitcast=True)
        total += tl.dot(left, right) * y_scale[:, None] * x_scale[None, :]
    tl.store(
        total_ptr + (expert * num_columns + n[:, None]) * width + k[None, :],
        total.to(total_ptr.dtype.element_ty),
        mask=(n < num_columns)[:, None] & (k < width)[None, :],
    )


@triton.jit
@no_type_check
def _scale(values, AXIS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    is_nan = tl.max((values != values).to(tl.int32), axis=AXIS) > 0
    return choose_scale(tl.max(tl.abs(values), axis=AXIS), is_nan, POWER_OF_TWO)
