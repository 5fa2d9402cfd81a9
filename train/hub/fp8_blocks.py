"""Weights in FP8 with one scale per 128x128 block, as DeepSeek-V3 was published.

R rows, C columns of a matrix; r and c its blocks, the last of each perhaps smaller
(arXiv:2412.19437, 3.3.2).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


class Quantised(NamedTuple):
    """`values * scales`, the scale of each block repeated over it, is the matrix again."""

    values: Tensor  # [R, C], torch.float8_e4m3fn
    scales: Float[Tensor, "r c"]  # fp32; the hub's `weight_scale_inv`


def quantise(matrix: Float[Tensor, "R C"]) -> Quantised:
    """The matrix in E4M3, each block scaled so that its largest entry becomes 448."""
    rows, columns = matrix.shape
    padded = F.pad(matrix.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [r, 128, c, 128]
    scales = blocks.abs().amax(dim=(1, 3)) / LARGEST
    scales = scales.where(scales > 0, 1.0)  # a block of zeros
    values = (blocks / scales[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    return Quantised(values[:rows, :columns].to(torch.float8_e4m3fn), scales)


def dequantise(values: Tensor, scales: Float[Tensor, "r c"]) -> Float[Tensor, "R C"]:
    """The matrix in fp32."""
    matrix = values.float()
    strips = matrix.split(BLOCK)  # scaled in place: one copy of the matrix is enough
    for strip, row in zip(strips, scales, strict=True):
        strip.mul_(row.repeat_interleave(BLOCK)[: matrix.shape[1]])
    return matrix


def count_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The scales' shape for a matrix of that shape."""
    return tuple(-(-size // BLOCK) for size in shape)
