"""SwiGLU in one pass: forward with the quantisation of its result, backward from its inputs' tiles.

M rows, F an expert's inner width.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import E4M3, TILE, Quantised
from model.fp8_operations import SwiGLUGradients
from model.kernels.e4m3 import choose_scale, encode

ROWS = 16  # of a program


def swiglu_into_tiles(gated: Tensor, upped: Tensor) -> Quantised:
    """Tiles of `silu(gated) * upped` [M, F]; the product itself is never written."""
    num_rows, width = gated.shape
    assert gated.is_contiguous()
    assert upped.is_contiguous()
    values = torch.empty(gated.shape, dtype=torch.uint8, device=gated.device)
    scales = torch.empty(num_rows, triton.cdiv(width, TILE), device=gated.device)
    if num_rows:
        grid = (triton.cdiv(num_rows, ROWS), scales.shape[1])
        _swiglu[grid](gated, upped, values, scales, num_rows, width, ROWS=ROWS, TILE=TILE)
    return Quantised(values.view(E4M3), scales)


def swiglu_backward(
    d_inner: Tensor, gated: Quantised, upped: Quantised, *, dtype: torch.dtype
) -> SwiGLUGradients:
    """As `model.fp8_operations.swiglu_backward`."""
    d_inner = d_inner.contiguous()
    parts = [part.contiguous() for part in (*gated, *upped)]
    num_rows, width = d_inner.shape
    results = SwiGLUGradients(*(torch.empty_like(d_inner, dtype=dtype) for _ in range(3)))
    if num_rows:
        grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(width, TILE))
        _swiglu_backward[grid](
            d_inner, *parts, *results, num_rows, width, ROWS=ROWS, TILE=TILE, num_warps=4
        )
    return results


@triton.jit
@no_type_check
def _swiglu(
    gated_ptr,
    upped_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    width,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile * TILE + tl.arange(0, TILE)
    is_inside = (row < num_rows)[:, None] & (column < width)[None, :]
    places = row[:, None] * width + column[None, :]
    gated = tl.load(gated_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    upped = tl.load(upped_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    x = gated / (1.0 + tl.exp(-gated)) * upped
    largest = tl.max(tl.abs(x), axis=1)
    is_nan = tl.max((x != x).to(tl.int32), axis=1) > 0
    scale = choose_scale(largest, is_nan, False)
    tl.store(values_ptr + places, encode(tl.div_rn(x, scale[:, None])), mask=is_inside)
    tl.store(scales_ptr + row * tl.num_programs(1) + tile, scale, mask=row < num_rows)


@triton.jit
@no_type_check
def _swiglu_backward(
    d_inner_ptr,
    gated_ptr,
    gated_scales_ptr,
    upped_ptr,
    upped_scales_ptr,
    inner_ptr,
    d_gated_ptr,
    d_upped_ptr,
    num_rows,
    width,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile * TILE + tl.arange(0, TILE)
    is_inside = (row < num_rows)[:, None] & (column < width)[None, :]
    places = row[:, None] * width + column[None, :]
    scale_places = row * tl.num_programs(1) + tile
    gated_scale = tl.load(gated_scales_ptr + scale_places, mask=row < num_rows, other=0.0)
    upped_scale = tl.load(upped_scales_ptr + scale_places, mask=row < num_rows, other=0.0)
    gated = tl.load(gated_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    upped = tl.load(upped_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    gated, upped = gated * gated_scale[:, None], upped * upped_scale[:, None]
    d_inner = tl.load(d_inner_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gated))
    activated = gated * share
    d_gated = d_inner * upped * share * (1.0 + gated * (1.0 - share))
    kind = inner_ptr.dtype.element_ty
    tl.store(inner_ptr + places, (activated * upped).to(kind), mask=is_inside)
    tl.store(d_gated_ptr + places, d_gated.to(kind), mask=is_inside)
    tl.store(d_upped_ptr + places, (d_inner * activated).to(kind), mask=is_inside)
