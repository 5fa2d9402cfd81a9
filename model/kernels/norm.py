"""RMSNorm in one pass over memory each way. M rows, D the normalised width."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 32  # whose shares of the gain's gradient a program of the backward pass adds up


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """As `torch.nn.functional.rms_norm`: [*batch, D] in x's dtype, computed in fp32."""
    normed: Tensor = _RMSNorm.apply(x, gain, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        num_rows, width = rows.shape
        normed = torch.empty_like(rows)
        inverse = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        if num_rows:
            _norm[(num_rows,)](
                rows,
                gain,
                normed,
                inverse,
                width,
                eps,
                BLOCK=triton.next_power_of_2(width),
                num_warps=_warps(width),
            )
        ctx.save_for_backward(rows, gain, inverse)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, gain, inverse = ctx.saved_tensors
        num_rows, width = rows.shape
        grad_rows = torch.empty_like(rows)
        num_programs = triton.cdiv(num_rows, ROWS)
        shares = torch.empty(num_programs, width, dtype=torch.float32, device=rows.device)
        if num_rows:
            _norm_backward[(num_programs,)](
                grad.reshape(rows.shape).contiguous(),
                rows,
                gain,
                inverse,
                grad_rows,
                shares,
                num_rows,
                width,
                ROWS=ROWS,
                BLOCK=triton.next_power_of_2(width),
                num_warps=_warps(width),
            )
        # Shares are added up in a fixed order: the same gradient at each run.
        return grad_rows.view(grad.shape), shares.sum(dim=0).to(gain.dtype), None


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8


@triton.jit
@no_type_check
def _norm(x_ptr, gain_ptr, normed_ptr, inverse_ptr, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=is_inside, other=0.0).to(tl.float32)
    gain = tl.load(gain_ptr + column, mask=is_inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / width + eps)
    normed = x * inverse * gain
    tl.store(
        normed_ptr + row * width + column, normed.to(normed_ptr.dtype.element_ty), mask=is_inside
    )
    tl.store(inverse_ptr + row, inverse)


@triton.jit
@no_type_check
def _norm_backward(
    grad_ptr,
    x_ptr,
    gain_ptr,
    inverse_ptr,
    grad_x_ptr,
    shares_ptr,
    num_rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = (g dy - x/r mean(g dy x/r)) / r and dg = sum(dy x/r), r the root mean square."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_inside = column < width
    gain = tl.load(gain_ptr + column, mask=is_inside, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, num_rows)):
        places = row * width + column
        grad = tl.load(grad_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row)
        unit = x * inverse
        slope = grad * gain
        grad_x = (slope - unit * (tl.sum(slope * unit, axis=0) / width)) * inverse
        tl.store(grad_x_ptr + places, grad_x.to(grad_x_ptr.dtype.element_ty), mask=is_inside)
        share += grad * unit
    tl.store(shares_ptr + program * width + column, share, mask=is_inside)
