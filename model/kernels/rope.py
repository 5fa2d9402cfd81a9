"""RoPE on MLA's split heads: the turned part is written beside the other, in one pass.

B batch, S sequence, T = B * S tokens, H heads, N a head's width without position, R = 2P with it.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

HEADS = 8  # of a program


def turn_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `model.rope.turn_tail`: [B, S, H, N + R] whose last R of each head are turned."""
    turned: Tensor = _TurnTail.apply(x, cos, sin)
    return turned


def join_turned(plain: Tensor, shared: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `model.rope.join_turned`: `plain` [B, S, H, N], and `shared` [B, S, 1, R] turned, by all
    heads."""
    joined: Tensor = _JoinTurned.apply(plain, shared, cos, sin)
    return joined


class _TurnTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        width = x.shape[-1] - 2 * cos.shape[-1]
        return _join(x[..., :width], x[..., width:], cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        width = grad.shape[-1] - 2 * cos.shape[-1]
        return _join(grad[..., :width], grad[..., width:], cos, sin, is_back=True), None, None


class _JoinTurned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Tensor, shared: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _join(plain, shared, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        width = grad.shape[-1] - 2 * cos.shape[-1]
        return grad[..., :width], _sum_heads(grad[..., width:], cos, sin), None, None


def _join(
    plain: Tensor, tail: Tensor, cos: Tensor, sin: Tensor, *, is_back: bool = False
) -> Tensor:
    """[B, S, H, N + R]; a tail of one head goes to all. `is_back` turns the other way."""
    batch, seq_len, num_heads, width = plain.shape
    pairs = cos.shape[-1]
    joined = plain.new_empty(batch, seq_len, num_heads, width + 2 * pairs)
    if not joined.numel():
        return joined
    _join_heads[(batch * seq_len, triton.cdiv(num_heads, HEADS))](
        plain,
        tail.expand(-1, -1, num_heads, -1),
        cos,
        sin,
        joined,
        seq_len,
        num_heads,
        width,
        pairs,
        *plain.stride(),
        *tail.expand(-1, -1, num_heads, -1).stride(),
        *cos.expand(batch, -1, -1).stride()[:2],
        IS_BACK=is_back,
        HEADS=HEADS,
        WIDTH=triton.next_power_of_2(max(width, 1)),
        PAIRS=triton.next_power_of_2(pairs),
    )
    return joined


def _sum_heads(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of what all heads share, [B, S, 1, R]: heads' gradients added up in fp32 and
    turned back."""
    batch, seq_len, num_heads, width = grad.shape
    total = grad.new_empty(batch, seq_len, 1, width)
    if not total.numel():
        return total
    _sum_turned[(batch * seq_len,)](
        grad,
        cos,
        sin,
        total,
        seq_len,
        num_heads,
        width // 2,
        *grad.stride(),
        *cos.expand(batch, -1, -1).stride()[:2],
        HEADS=triton.next_power_of_2(num_heads),
        PAIRS=triton.next_power_of_2(width // 2),
    )
    return total


@triton.jit
@no_type_check
def _join_heads(
    plain_ptr,
    tail_ptr,
    cos_ptr,
    sin_ptr,
    joined_ptr,
    seq_len,
    num_heads,
    width,
    pairs,
    plain_batch_stride,
    plain_token_stride,
    plain_head_stride,
    plain_stride,
    tail_batch_stride,
    tail_token_stride,
    tail_head_stride,
    tail_stride,
    angle_batch_stride,
    angle_token_stride,
    IS_BACK: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // seq_len, token % seq_len
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    has_head = head < num_heads
    kind = joined_ptr.dtype.element_ty
    joined_ptr += (token * num_heads + head) * (width + 2 * pairs)

    column = tl.arange(0, WIDTH)[None, :]
    plain_ptr += batch * plain_batch_stride + place * plain_token_stride
    is_inside = has_head & (column < width)
    plain = tl.load(
        plain_ptr + head * plain_head_stride + column * plain_stride, mask=is_inside, other=0.0
    )
    tl.store(joined_ptr + column, plain, mask=is_inside)

    pair = tl.arange(0, PAIRS)
    angle = batch * angle_batch_stride + place * angle_token_stride + pair
    cos = tl.load(cos_ptr + angle, mask=pair < pairs, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=pair < pairs, other=0.0)[None, :]
    if IS_BACK:
        sin = -sin
    pair = pair[None, :]
    is_inside = has_head & (pair < pairs)
    tail_ptr += batch * tail_batch_stride + place * tail_token_stride
    tail_ptr += head * tail_head_stride + 2 * pair * tail_stride
    first = tl.load(tail_ptr, mask=is_inside, other=0.0).to(tl.float32)
    second = tl.load(tail_ptr + tail_stride, mask=is_inside, other=0.0).to(tl.float32)
    joined_ptr += width + 2 * pair
    tl.store(joined_ptr, (first * cos - second * sin).to(kind), mask=is_inside)
    tl.store(joined_ptr + 1, (first * sin + second * cos).to(kind), mask=is_inside)


@triton.jit
@no_type_check
def _sum_turned(
    grad_ptr,
    cos_ptr,
    sin_ptr,
    total_ptr,
    seq_len,
    num_heads,
    pairs,
    batch_stride,
    token_stride,
    head_stride,
    stride,
    angle_batch_stride,
    angle_token_stride,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // seq_len, token % seq_len
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)
    angle = batch * angle_batch_stride + place * angle_token_stride + pair
    cos = tl.load(cos_ptr + angle, mask=pair < pairs, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=pair < pairs, other=0.0)
    is_inside = (head < num_heads) & (pair < pairs)[None, :]
    grad_ptr += batch * batch_stride + place * token_stride
    grad_ptr += head * head_stride + 2 * pair[None, :] * stride
    first = tl.sum(tl.load(grad_ptr, mask=is_inside, other=0.0).to(tl.float32), axis=0)
    second = tl.sum(tl.load(grad_ptr + stride, mask=is_inside, other=0.0).to(tl.float32), axis=0)
    kind = total_ptr.dtype.element_ty
    total_ptr += token * 2 * pairs + 2 * pair
    tl.store(total_ptr, (first * cos + second * sin).to(kind), mask=pair < pairs)
    tl.store(total_ptr + 1, (second * cos - first * sin).to(kind), mask=pair < pairs)
