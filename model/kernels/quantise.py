"""E4M3 in one pass over memory: activations in tiles of 1x128, weights in blocks of 128x128."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import E4M3, TILE, Quantised, Scale
from model.kernels.e4m3 import choose_scale, encode

ROWS = 16  # of a program


def quantise_tiles(x: Tensor, scale: Scale = Scale.exact) -> Quantised:
    """As `model.fp8.quantise_tiles`."""
    rows = x.reshape(-1, x.shape[-1])
    num_rows, width = rows.shape
    values = torch.empty(rows.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(num_rows, triton.cdiv(width, TILE), device=x.device)
    if num_rows:
        grid = (triton.cdiv(num_rows, ROWS), scales.shape[1])
        _quantise[grid](
            rows,
            values,
            scales,
            num_rows,
            width,
            rows.stride(0),
            rows.stride(1),
            ROWS=ROWS,
            TILE=TILE,
            POWER_OF_TWO=scale is Scale.power_of_two,
        )
    shape = x.shape[:-1]
    return Quantised(values.view(E4M3).view(x.shape), scales.view(*shape, scales.shape[1]))


def quantise_blocks(weight: Tensor, scale: Scale = Scale.exact) -> Quantised:
    """As `model.fp8.quantise_blocks`."""
    matrices = weight.reshape(-1, *weight.shape[-2:])
    count, num_rows, width = matrices.shape
    values = torch.empty(matrices.shape, dtype=torch.uint8, device=weight.device)
    blocks = (triton.cdiv(num_rows, TILE), triton.cdiv(width, TILE))
    scales = torch.empty(count, *blocks, device=weight.device)
    _quantise_block[(count * blocks[0], blocks[1])](
        matrices,
        values,
        scales,
        num_rows,
        width,
        blocks[0],
        *matrices.stride(),
        TILE=TILE,
        POWER_OF_TWO=scale is Scale.power_of_two,
        num_warps=8,
    )
    shape = (*weight.shape[:-2], *blocks)
    return Quantised(values.view(E4M3).view(weight.shape), scales.view(shape))


@triton.jit
@no_type_check
def _quantise(
    x_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    width,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """One tile of some rows. Strides let a transposed matrix be read: tiles of its columns."""
    tile = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile * TILE + tl.arange(0, TILE)
    is_inside = (row < num_rows)[:, None] & (column < width)[None, :]
    places = row[:, None] * row_stride + column[None, :] * column_stride
    x = tl.load(x_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    is_nan = tl.max((x != x).to(tl.int32), axis=1) > 0
    scale = choose_scale(largest, is_nan, POWER_OF_TWO)
    codes = encode(tl.div_rn(x, scale[:, None]))
    tl.store(values_ptr + row[:, None] * width + column[None, :], codes, mask=is_inside)
    tl.store(scales_ptr + row * tl.num_programs(1) + tile, scale, mask=row < num_rows)


@triton.jit
@no_type_check
def _quantise_block(
    weight_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    width,
    blocks_per_column,
    matrix_stride,
    row_stride,
    column_stride,
    TILE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """One block of one matrix."""
    matrix = (tl.program_id(0) // blocks_per_column).to(tl.int64)
    row = tl.program_id(0) % blocks_per_column * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_inside = (row < num_rows)[:, None] & (column < width)[None, :]
    places = matrix * matrix_stride + row[:, None] * row_stride + column[None, :] * column_stride
    x = tl.load(weight_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    is_nan = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0) > 0
    scale = choose_scale(largest, is_nan, POWER_OF_TWO)
    codes = encode(tl.div_rn(x, scale))
    places = (matrix * num_rows + row[:, None]) * width + column[None, :]
    tl.store(values_ptr + places, codes, mask=is_inside)
    tl.store(scales_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)
