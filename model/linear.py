"""A product with one learned matrix: the seam at which its precision is chosen.

K the input's width, N the output's.
"""

from jaxtyping import Float
from torch import Tensor, nn

from model.fp8_linear import Kept, linear_in_fp8
from model.products import Products


class Linear(Products, nn.Linear):
    """`weight x + bias`. Used for every product but the head's, the router's and the experts'."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        kept: Kept = Kept.e4m3,
    ) -> None:
        """`kept` is how FP8 keeps the input for the backward pass."""
        super().__init__(in_features, out_features, bias=bias)
        self.kept = kept

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        if not self.is_fp8:
            return super().forward(x)
        y = linear_in_fp8(x, self.weight, kept=self.kept)
        return y if self.bias is None else y + self.bias
