"""Rows of experts: tokens copied to their choices' places, and results added up, in one pass each.

T tokens, K choices per token, M = T * K rows, D width.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.dispatch import invert

BLOCK = 1024  # columns of a program


def permute(tokens: Tensor, order: Tensor, top_k: int) -> Tensor:
    """As `model.dispatch.permute`; `order` is a permutation."""
    rows: Tensor = _Permute.apply(tokens, order, top_k)
    return rows


def combine(outputs: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """As `model.dispatch.combine`, with weights in the outputs' dtype."""
    mixed: Tensor = _Combine.apply(outputs, weights, order)
    return mixed


def gather(rows: Tensor, places: Tensor) -> Tensor:
    """`rows[places]` [len(places), D]."""
    gathered = rows.new_empty(len(places), rows.shape[1])
    if gathered.numel():
        grid = (len(places), triton.cdiv(rows.shape[1], BLOCK))
        _gather[grid](rows.contiguous(), places, gathered, rows.shape[1], BLOCK=BLOCK)
    return gathered


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return gather(tokens, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _add_up(grad, None, invert(order).unflatten(0, (-1, ctx.top_k))), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        outputs, weights = outputs.contiguous(), weights.contiguous()
        ctx.save_for_backward(outputs, weights, order)
        return _add_up(outputs, weights, invert(order).view_as(weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        outputs, weights, order = ctx.saved_tensors
        grad_outputs, grad_weights = torch.empty_like(outputs), torch.empty_like(weights)
        if outputs.numel():
            _spread[(len(outputs),)](
                grad.contiguous(),
                outputs,
                weights,
                order,
                grad_outputs,
                grad_weights,
                outputs.shape[1],
                weights.shape[1],
                BLOCK=BLOCK,
            )
        return grad_outputs, grad_weights, None


def _add_up(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    """Each token's sum, in fp32, of its rows at `places` [T, K], weighted if there are weights."""
    num_tokens, top_k = places.shape
    width = rows.shape[1]
    total = rows.new_empty(num_tokens, width)
    if total.numel():
        _add[(num_tokens, triton.cdiv(width, BLOCK))](
            rows.contiguous(),
            rows if weights is None else weights,
            places,
            total,
            width,
            K=top_k,
            HAS_WEIGHTS=weights is not None,
            BLOCK=BLOCK,
        )
    return total


@triton.jit
@no_type_check
def _gather(rows_ptr, places_ptr, gathered_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < width
    place = tl.load(places_ptr + row)
    x = tl.load(rows_ptr + place * width + column, mask=is_inside, other=0.0)
    tl.store(gathered_ptr + row * width + column, x, mask=is_inside)


@triton.jit
@no_type_check
def _add(
    rows_ptr,
    weights_ptr,
    places_ptr,
    total_ptr,
    width,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places_ptr + token * K + k)
        row = tl.load(rows_ptr + place * width + column, mask=is_inside, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            row = row * tl.load(weights_ptr + token * K + k).to(tl.float32)
        total += row
    tl.store(
        total_ptr + token * width + column, total.to(total_ptr.dtype.element_ty), mask=is_inside
    )


@triton.jit
@no_type_check
def _spread(
    grad_ptr,
    outputs_ptr,
    weights_ptr,
    order_ptr,
    grad_outputs_ptr,
    grad_weights_ptr,
    width,
    top_k,
    BLOCK: tl.constexpr,
):
    """Of one row: its share of its token's gradient, and the gradient of its weight."""
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(order_ptr + row)
    weight = tl.load(weights_ptr + choice).to(tl.float32)
    product = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_inside = column < width
        grad = tl.load(grad_ptr + choice // top_k * width + column, mask=is_inside, other=0.0).to(
            tl.float32
        )
        output = tl.load(outputs_ptr + row * width + column, mask=is_inside, other=0.0)
        product += grad * output.to(tl.float32)
        share = (grad * weight).to(grad_outputs_ptr.dtype.element_ty)
        tl.store(grad_outputs_ptr + row * width + column, share, mask=is_inside)
    of_weight = tl.sum(product, axis=0).to(grad_weights_ptr.dtype.element_ty)
    tl.store(grad_weights_ptr + choice, of_weight)
