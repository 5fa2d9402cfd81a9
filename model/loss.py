"""Cross-entropy over the vocabulary without ever holding all logits.

N positions, D model width, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that is not predicted; torch's own default

# fp32 logits alive at once. A CPU likes those that stay in its cache, a GPU large products.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}


def summed_cross_entropy(
    hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], targets: Int64[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Sum in nats, fp32, over the positions whose target is not IGNORED.

    Logits exist for a few rows at a time. Their gradient is taken in the same pass, since the
    loss is a scalar: the backward pass only scales it. (torch 2.13's `linear_cross_entropy`
    chunks as well, but is slower here on the CPU: `python -m bench.loss`.)
    """
    if not torch.is_grad_enabled():  # a Function is not told, and would take gradients for nothing
        hidden, head = hidden.detach(), head.detach()
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, head, targets)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_head, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        total = hidden.new_zeros((), dtype=torch.float32)
        chunk = max(1, CHUNK_BYTES[hidden.device.type] // (4 * head.shape[0]))
        buffer = hidden.new_empty(min(chunk, hidden.shape[0]), head.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            x = hidden[rows]
            logits = torch.mm(x, head.t(), out=buffer[: x.shape[0]]).float()
            is_kept = (targets[rows] != IGNORED)[:, None]
            wanted = targets[rows, None].where(is_kept, 0)
            logits -= logits.amax(dim=-1, keepdim=True)
            wanted_logits = logits.gather(-1, wanted)
            exponentials = logits.exp_()
            normaliser = exponentials.sum(dim=-1, keepdim=True)
            total += torch.where(is_kept, normaliser.log() - wanted_logits, 0.0).sum()
            if grad_hidden is None and grad_head is None:
                continue
            grad = exponentials.mul_(is_kept / normaliser)  # probabilities, 0 where IGNORED
            grad.scatter_add_(-1, wanted, -is_kept.float())
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[rows])
            if grad_head is not None:
                _add_product(grad_head, grad.t(), x)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * scale).to(ctx.head_dtype)
        return grad_hidden, grad_head, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, `total` being fp32: without a temporary where that is possible."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
