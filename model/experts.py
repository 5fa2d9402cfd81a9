"""The routed experts: stacked SwiGLU networks.

N rows sorted by expert, E experts on this rank, D model width, F an expert's inner width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.fp8_swiglu import grouped_swiglu_in_fp8
from model.grouped import grouped_swiglu
from model.products import Products


class Experts(Products):
    """Experts `first` to `first + num_local` of all, each a SwiGLU network."""

    def __init__(self, *, first: int, num_local: int, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.first = first
        self.gate = nn.Parameter(torch.empty(num_local, inner_dim, dim))
        self.up = nn.Parameter(torch.empty(num_local, inner_dim, dim))
        self.down = nn.Parameter(torch.empty(num_local, dim, inner_dim))

    def forward(self, rows: Float[Tensor, "N D"], counts: list[int]) -> Float[Tensor, "N D"]:
        """Each expert's output for its own run of rows; `counts` gives the runs' lengths."""
        multiply = grouped_swiglu_in_fp8 if self.is_fp8 else grouped_swiglu
        return multiply(rows, self.gate, self.up, self.down, counts=counts)
