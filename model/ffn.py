"""SwiGLU feed-forward network (arXiv:2002.05202). D model width, F inner width."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.compiled import region
from model.fp8_swiglu import grouped_swiglu_in_fp8
from model.products import Products
from model.recompute import rebuild


class SwiGLU(Products):
    """A gated feed-forward network: the dense layers' whole, the MoE layers' shared experts."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, inner_dim, bias=False)
        self.up = nn.Linear(dim, inner_dim, bias=False)
        self.down = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        if self.is_fp8:
            rows = x.flatten(0, -2)
            weights = (layer.weight[None] for layer in (self.gate, self.up, self.down))
            return grouped_swiglu_in_fp8(rows, *weights, counts=[len(rows)]).view_as(x)
        return self.down(rebuild(gate_product, self.gate(x), self.up(x)))


@region(lambda like: (like, like))
def gate_product(gated: Tensor, upped: Tensor) -> Tensor:
    """SwiGLU between its products."""
    return F.silu(gated) * upped
