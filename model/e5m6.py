"""E5M6 in twelve bits: how DeepSeek-V3 keeps an attention's output (arXiv:2412.19437, 3.3.3).

The input of attention's last product is needed again by attention's own backward pass, which is
sensitive to precision; FP8 is too coarse there. E5M6 is fp16 without its last four bits.
K a row's width, k its tiles of 128.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.fp8 import TILE, Quantised, round_up

LARGEST = 65024.0  # 2^15 * (2 - 2^-6)
_DROPPED = 4  # bits of fp16's mantissa
_SMALLEST_EXPONENT = -13  # of 2^-14, as frexp gives it: smaller numbers have no further steps


def quantise_e5m6(x: Float[Tensor, "*rows K"]) -> Quantised:
    """Each row in tiles of 128: two values in three bytes [..., 3 K' / 2], scales [..., k].

    K' is K rounded up to whole tiles. Scales are powers of two.
    """
    width = x.shape[-1]
    padded = F.pad(x, (0, -width % TILE)) if width % TILE else x
    tiles = padded.unflatten(-1, (-1, TILE)).float()
    largest = tiles.abs().amax(dim=-1)
    scales = round_up((largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny))
    return Quantised(_pack((tiles / scales[..., None]).flatten(-2)), scales)


def dequantise_e5m6(tiles: Quantised, *, width: int) -> Float[Tensor, "*rows K"]:
    """The numbers again, in fp32; `width` is K."""
    values = _unpack(tiles.values).unflatten(-1, (-1, TILE))
    return (values * tiles.scales[..., None]).flatten(-2)[..., :width]


def _pack(x: Tensor) -> Tensor:
    """Round to E5M6 (ties to even), and put the twelve bits of two neighbours into three bytes."""
    exponents = torch.frexp(x).exponent.clamp(min=_SMALLEST_EXPONENT)
    steps = torch.ldexp(torch.ones_like(x), exponents - 7)
    bits = ((x / steps).round() * steps).half().view(torch.int16).int() & 0xFFFF
    first, second = (bits >> _DROPPED).unflatten(-1, (-1, 2)).unbind(-1)
    three = (first >> 4, ((first & 0xF) << 4) | (second >> 8), second & 0xFF)
    return torch.stack(three, dim=-1).flatten(-2).to(torch.uint8)


def _unpack(packed: Tensor) -> Tensor:
    one, two, three = packed.int().unflatten(-1, (-1, 3)).unbind(-1)
    codes = torch.stack(((one << 4) | (two >> 4), ((two & 0xF) << 8) | three), dim=-1).flatten(-2)
    return (codes << _DROPPED).to(torch.int16).view(torch.float16).float()
