"""E4M3 with fine-grained scales (arXiv:2412.19437, 3.3.2): tiles of activations, blocks of weights.

K the summed width of a product, k its tiles of 128; N and n likewise for a weight's rows. The last
tile or block of a width that 128 does not divide is smaller.
"""

from enum import Enum
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TILE = 128
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # what is smaller still rounds to 0 under it


class Scale(Enum):
    """What the largest value of a tile becomes: 448, or as near to it as powers of two come.

    Scales that are powers of two round nothing: a tile may be quantised again, also in another
    direction, and loses only what is too small beside its new neighbours.
    """

    exact = "exact"
    power_of_two = "power of two"


class Quantised(NamedTuple):
    """Values in E4M3, and the fp32 factor of each tile or block that makes them numbers again."""

    values: Tensor
    scales: Tensor


def quantise_tiles(x: Float[Tensor, "*rows K"], scale: Scale = Scale.exact) -> Quantised:
    """Each row in tiles of 128, scaled by the largest magnitude: values [..., K], scales [..., k].

    A tile with a NaN or an infinity becomes NaN as a whole, or infinite: never a finite number.
    """
    width = x.shape[-1]
    tiles = _pad(x, 0, -width % TILE).unflatten(-1, (-1, TILE)).float()
    scales = choose_scales(tiles.abs().amax(dim=-1), scale)
    values = (tiles / scales[..., None]).to(E4M3).flatten(-2)
    return Quantised(values[..., :width], scales)


def dequantise_tiles(tiles: Quantised) -> Float[Tensor, "*rows K"]:
    """The numbers again, in fp32."""
    width = tiles.values.shape[-1]
    values = _pad(as_fp32(tiles.values), 0, -width % TILE).unflatten(-1, (-1, TILE))
    return (values * tiles.scales[..., None]).flatten(-2)[..., :width]


def quantise_blocks(weight: Float[Tensor, "*stack N K"], scale: Scale = Scale.exact) -> Quantised:
    """Each matrix in blocks of 128x128: values [..., N, K], scales [..., n, k]."""
    rows, columns = weight.shape[-2:]
    padded = _pad(weight, -rows % TILE, -columns % TILE).float()
    blocks = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))  # [..., n, 128, k, 128]
    scales = choose_scales(blocks.abs().amax(dim=(-3, -1)), scale)
    values = (blocks / scales[..., :, None, :, None]).to(E4M3).flatten(-2).flatten(-3, -2)
    return Quantised(values[..., :rows, :columns].contiguous(), scales)


def dequantise_blocks(blocks: Quantised) -> Float[Tensor, "*stack N K"]:
    """The matrices again, in fp32."""
    rows, columns = blocks.values.shape[-2:]
    of_rows = blocks.scales.repeat_interleave(TILE, dim=-2)[..., :rows, :]
    padded = _pad(as_fp32(blocks.values), 0, -columns % TILE).unflatten(-1, (-1, TILE))
    return (padded * of_rows[..., None]).flatten(-2)[..., :columns]


def choose_scales(largest: Float[Tensor, "*any"], scale: Scale) -> Float[Tensor, "*any"]:
    """The factor for values up to `largest`: 1 where all are 0, and NaN where one is NaN."""
    scales = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
    scales = scales.where(largest != 0, 1.0)
    return round_up(scales) if scale is Scale.power_of_two else scales


def round_up(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The next power of two, on the bits of positive normal fp32 numbers; NaN stays NaN."""
    bits = (x.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return bits.view(torch.float32).where(~x.isnan(), x)


def as_fp32(values: Tensor) -> Float[Tensor, "*any"]:
    """E4M3 as fp32. On the CPU, where torch 2.13 converts one by one, by a table of the 256."""
    if values.device.type != "cpu":
        return values.float()
    codes = values.reshape(-1).view(torch.uint8).int()
    return _table().index_select(0, codes).view(values.shape)


@cache
def _table() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(E4M3).float()


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros after the last rows and columns; the tensor itself where none are missing."""
    return F.pad(x, (0, columns, 0, rows) if rows else (0, columns)) if rows or columns else x
