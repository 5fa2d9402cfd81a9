"""Rows in FP8 on their way between ranks: one byte per number, and one per 128 for the scale.

N rows, D their width, d its tiles of 128, B = D + d bytes.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from model.fp8 import E4M3, TILE, Quantised, Scale, dequantise_tiles
from model.fp8_operations import operations_on


def message_bytes(dim: int) -> int:
    """What a row of that width takes."""
    return dim - (-dim // TILE)


def encode(rows: Float[Tensor, "N D"]) -> UInt8[Tensor, "N B"]:
    """The rows' E4M3 values, and behind them the exponents of their tiles' scales."""
    tiles = operations_on(rows.device).quantise_tiles(rows, Scale.power_of_two)
    exponents = (tiles.scales.view(torch.int32) >> 23).to(torch.uint8)  # NaN: 255, as infinity
    return torch.cat((tiles.values.view(torch.uint8), exponents), dim=1)


def decode(message: UInt8[Tensor, "N B"], *, width: int) -> Float[Tensor, "N D"]:
    """The rows in fp32; BF16 holds them exactly."""
    values, exponents = message.split((width, -(-width // TILE)), dim=1)
    scales = (exponents.int() << 23).view(torch.float32)
    return dequantise_tiles(Quantised(values.contiguous().view(E4M3), scales))
