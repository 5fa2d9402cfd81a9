"""Weights in FP8 with one scale per 128x128 block, as DeepSeek-V3 was published: reading them back.

They are written by `model.fp8.quantise_blocks`; the scales are the hub's `weight_scale_inv`.

R rows, C columns of a matrix; r and c its blocks, the last of each perhaps smaller
(arXiv:2412.19437, 3.3.2).
"""

from jaxtyping import Float
from torch import Tensor

from model.fp8 import TILE

BLOCK = TILE


def dequantise(values: Tensor, scales: Float[Tensor, "r c"]) -> Float[Tensor, "R C"]:
    """The matrix in fp32, with no more than one copy of it."""
    matrix = values.float()
    strips = matrix.split(BLOCK)  # scaled in place: one copy of the matrix is enough
    for strip, row in zip(strips, scales, strict=True):
        strip.mul_(row.repeat_interleave(BLOCK)[: matrix.shape[1]])
    return matrix


def count_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The scales' shape for a matrix of that shape."""
    return tuple(-(-size // BLOCK) for size in shape)
