"""Muon: momentum, orthogonalised, for matrices (Keller Jordan's post; arXiv:2502.16982 at scale).

A step moves a matrix along the semi-orthogonal matrix nearest to its momentum, so that it learns
in all singular directions at one rate. K matrices of a stack, R rows, C columns.
"""

import math
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from train.optimizer.adamw import AdamW
from train.optimizer.matrix_parts import MatrixParts, all_of
from train.optimizer.moments import Moments, stretches

MOMENTUM = "momentum"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the post's quintic, steep at zero
EPS = 1e-7
AT_ONCE = 2**26  # elements of a stack that are orthogonalised together, which bounds memory


class AdjustLR(StrEnum):
    """How a matrix's shape enters its learning rate."""

    original = "original"
    match_rms_adamw = "match_rms_adamw"

    def ratio(self, rows: int, columns: int) -> float:
        """The post's; or Moonlight's, whose updates are as large as AdamW's (2.2)."""
        if self is AdjustLR.original:
            return math.sqrt(max(1, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


class MuonSettings(NamedTuple):
    """`torch.optim.Muon`'s, with its defaults; `lr_ratio` and `dtype` are ours."""

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr: AdjustLR = AdjustLR.original
    lr_ratio: float = 1.0  # Muon's learning rate over its group's
    dtype: torch.dtype = torch.bfloat16  # of the iteration


class Muon(AdamW):
    """Muon over the groups with `algorithm="muon"`, AdamW over the others.

    Parameters are whole (matrices, or stacks of them), or ZeRO's flat parts, of which `place` says
    what they consist of. Gradients arrive clipped; the orthogonalised update is never scaled.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        muon: MuonSettings = MuonSettings(),  # noqa: B008  (a tuple)
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: Moments = Moments.fp32,
    ) -> None:
        super().__init__(
            groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, moments=moments
        )
        self.muon = muon
        self._parts: dict[Tensor, MatrixParts] = {}

    def place(self, flat: Tensor, parts: MatrixParts) -> None:
        """Say which matrices a flat part consists of."""
        self._parts[flat] = parts

    def kept(self, parameter: Tensor) -> tuple[str, ...]:
        is_muon = any(
            parameter is member
            for group in self.param_groups
            if group["algorithm"] == "muon"
            for member in group["params"]
        )
        return (MOMENTUM,) if is_muon else super().kept(parameter)

    @torch.no_grad()
    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """One step of one parameter or flat part, by its group's algorithm."""
        if group["algorithm"] != "muon":
            super().update(parameter, group)
            return
        state = self.start(parameter)
        update = self._accumulate(parameter, state)
        state["step"] += 1
        parts = self._parts.get(parameter)
        parts = all_of(parameter) if parts is None else parts
        gathered = parts.gather(update)

        lr = group["lr"] * self.muon.lr_ratio
        weights = parameter.view(-1)
        weights.mul_(1 - lr * group["weight_decay"])
        for stack in parts.whole:
            here = stack.within(parts.size)
            length = max(AT_ONCE // stack.numel, 1) * stack.numel
            rate = lr * self.muon.adjust_lr.ratio(stack.rows, stack.columns)
            moved = zip(weights[here].split(length), update[here].split(length), strict=True)
            for some, of_some in moved:
                matrices = self._orthogonalise(of_some.view(-1, stack.rows, stack.columns))
                some.add_(matrices.reshape(-1), alpha=-rate)
        for matrix, whole in zip(parts.cut, gathered, strict=True):
            here = matrix.within(parts.size)
            rate = lr * self.muon.adjust_lr.ratio(matrix.rows, matrix.columns)
            direction = self._orthogonalise(whole[None]).reshape(-1)
            part = slice(here.start - matrix.start, here.stop - matrix.start)
            weights[here].add_(direction[part], alpha=-rate)

    def _accumulate(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        """The momentum after this gradient, ahead of itself (Nesterov); flat, in `dtype`."""
        assert parameter.grad is not None
        grad, beta = parameter.grad.view(-1), self.muon.momentum
        update = torch.empty_like(grad, dtype=self.muon.dtype)
        for part in stretches(parameter):
            momentum = self.format.read(state, MOMENTUM, part)
            momentum.lerp_(grad[part], 1 - beta)
            ahead = grad[part].lerp(momentum, beta) if self.muon.nesterov else momentum
            update[part].copy_(ahead)
            self.format.write(state, MOMENTUM, part, momentum)
        return update

    def _orthogonalise(self, matrices: Float[Tensor, "K R C"]) -> Float[Tensor, "K R C"]:
        return orthogonalise(matrices, steps=self.muon.ns_steps)


def orthogonalise(matrices: Float[Tensor, "K R C"], *, steps: int) -> Float[Tensor, "K R C"]:
    """Each matrix with its singular values brought near 1 (between 0.7 and 1.2, mostly).

    Newton-Schulz iterations of a quintic polynomial, in the dtype of what comes in.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
