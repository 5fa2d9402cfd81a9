"""Grouped SwiGLU: each expert's rows through its own network.

N rows sorted by expert, E experts, D model width, F an expert's inner width.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.backends import Backend, choose_experts
from model.ffn import gate_product
from model.recompute import is_rebuilding, rebuild

Product = Callable[[Tensor, Tensor, list[int]], Tensor]  # rows, weights [E, N, K], counts


def grouped_swiglu(
    rows: Float[Tensor, "N D"],
    gate: Float[Tensor, "E F D"],
    up: Float[Tensor, "E F D"],
    down: Float[Tensor, "E D F"],
    *,
    counts: list[int],
) -> Float[Tensor, "N D"]:
    """`down (silu(gate x) * up x)` for each row x, with the matrices of its expert.

    Expert e owns the next `counts[e]` rows. An expert without rows still takes part: its weights
    get gradients of zeros, never none, which ZeRO relies on. On GPUs one kernel does each product,
    torch's or ours (`model/backends.py`; BF16 only); on the CPU, in fp32, a loop that keeps an
    expert's rows in the cache is faster (`python -m bench.grouped`).
    """
    widths = (gate.shape[2], gate.shape[1])
    backend = choose_experts(rows.device, rows.dtype, widths=widths).backend
    if backend is Backend.reference:
        outputs: Tensor = _SwiGLULoop.apply(rows, gate, up, down, counts, not is_rebuilding())
        return outputs
    multiply = _by_kernel if backend is Backend.triton else _by_grouped_mm
    inner = rebuild(_grouped_gate_product, multiply, rows, gate, up, counts)
    return multiply(inner, down, counts)


def _grouped_gate_product(
    multiply: Product, rows: Tensor, gate: Tensor, up: Tensor, counts: list[int]
) -> Tensor:
    return gate_product(multiply(rows, gate, counts), multiply(rows, up, counts))


def _by_kernel(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    from model.kernels.grouped_bf16 import grouped_product  # triton need not be installed

    return grouped_product(rows, weights, counts)


def _by_grouped_mm(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    ends = _ends(tuple(counts), rows.device)
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


@lru_cache(maxsize=4)  # a layer's products, one after another, ask for the same
def _ends(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


class _SwiGLULoop(torch.autograd.Function):
    """One expert after another: its rows stay in the cache from the first product to the last."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        counts: list[int],
        is_all_kept: bool,
    ) -> Tensor:
        num_kept = rows.shape[0] if is_all_kept else max(counts)
        gated, upped = (rows.new_empty(num_kept, gate.shape[1]) for _ in range(2))
        outputs = torch.empty_like(rows)
        of_experts = (_runs(tensor, counts) for tensor in (rows, gated, upped, outputs))
        for x, g, u, y, w_gate, w_up, w_down in zip(*of_experts, gate, up, down, strict=True):
            torch.mm(x, w_gate.t(), out=g)
            torch.mm(x, w_up.t(), out=u)
            torch.mm(F.silu(g).mul_(u), w_down.t(), out=y)
        inner = (gated, upped) if is_all_kept else ()
        ctx.save_for_backward(rows, gate, up, down, *inner)
        ctx.counts = counts
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, down, *inner = ctx.saved_tensors
        weights = (gate, up, down)
        is_all_kept = bool(inner)
        if not is_all_kept:
            inner = [rows.new_empty(max(ctx.counts), gate.shape[1]) for _ in range(2)]
        grad_rows = torch.empty_like(rows)
        grad_weights = [torch.empty_like(weight) for weight in weights]
        of_experts = (_runs(tensor, ctx.counts) for tensor in (rows, *inner, grad, grad_rows))
        for x, g, u, dy, dx, w_gate, w_up, w_down, dw_gate, dw_up, dw_down in zip(
            *of_experts, *weights, *grad_weights, strict=True
        ):
            if not is_all_kept:
                torch.mm(x, w_gate.t(), out=g)
                torch.mm(x, w_up.t(), out=u)
            activated = F.silu(g)
            torch.mm(dy.t(), activated * u, out=dw_down)
            d_inner = dy @ w_down
            du = activated.mul_(d_inner)
            dg = torch.ops.aten.silu_backward(d_inner.mul_(u), g)
            torch.mm(dg.t(), x, out=dw_gate)
            torch.mm(du.t(), x, out=dw_up)
            torch.mm(dg, w_gate, out=dx).addmm_(du, w_up)
        return grad_rows, *grad_weights, None, None


def _runs(tensor: Tensor, counts: list[int]) -> list[Tensor]:
    """Each expert's run of rows; of a buffer too short for all, the same rows for each."""
    if tensor.shape[0] == sum(counts):
        return list(tensor.split(counts))
    return [tensor[:count] for count in counts]
