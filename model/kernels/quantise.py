"""Activations into E4M3 tiles of 1x128: the kernel beside `model.fp8.quantise_tiles`."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import E4M3, TILE, Quantised, Scale
from model.kernels.e4m3 import choose_scale, encode

ROWS = 16  # of a program


def quantise_tiles(x: Tensor, scale: Scale = Scale.exact) -> Quantised:
    """As `model.fp8.quantise_tiles`, in one pass over memory."""
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
