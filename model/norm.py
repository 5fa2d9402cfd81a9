"""RMSNorm (arXiv:1910.07467). D the normalised width."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.backends import Backend, choose_norm


class RMSNorm(nn.Module):
    """Each vector divided by its root mean square, times a learned gain."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        if choose_norm(x.device).backend is Backend.triton:
            from model.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps)
        if x.device.type == "cpu" and x.dtype == torch.float32:
            # torch has a fused kernel on GPUs only; here its gradient takes twice as long.
            normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
            return normed
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """y = g x / r with r the root mean square, in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1]
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, inverse)
        return (x * inverse).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = (g dy - x mean(g dy x) / r^2) / r and dg = sum(dy x / r)."""
        x, gain, inverse = ctx.saved_tensors
        product = (grad * x).reshape(-1, x.shape[-1])
        grad_gain = product.t().mv(inverse.flatten())
        slope = product.mv(gain).view_as(inverse) * inverse**3 / x.shape[-1]
        return (grad * gain).mul_(inverse).addcmul_(x, slope, value=-1), grad_gain, None
