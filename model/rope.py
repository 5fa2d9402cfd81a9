"""Rotary position embedding (arXiv:2104.09864), with the ways to stretch its context.

B batch, S sequence, H heads, R rotated dimensions of a head (even), P = R/2 pairs, N dimensions
that are not, K = N + R.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from model.backends import Backend, choose_rope
from model.compiled import region


class RopeScaling(StrEnum):
    """Linear: all positions divided. YaRN: pairs apart (arXiv:2309.00071). llama3: Llama 3.1's."""

    none = "none"
    linear = "linear"
    yarn = "yarn"
    llama3 = "llama3"


@dataclass(slots=True, kw_only=True)
class RopeConfig:
    #: Base of the geometric series of wavelengths.
    theta: float = 10_000.0
    #: How positions beyond `original_seq_len` are reached.
    scaling: RopeScaling = RopeScaling.none
    #: Context after the extension divided by the context before it.
    factor: float = 1.0
    #: YaRN, llama3: context length, in tokens, of the model before the extension.
    original_seq_len: int = 4096
    #: YaRN: pairs that turn more often than this in the original context keep their frequency.
    beta_fast: float = 32.0
    #: YaRN: pairs that turn less often than this are interpolated in full.
    beta_slow: float = 1.0
    #: YaRN: strength of the temperature on cosine and sine, relative to `mscale_all_dim`.
    mscale: float = 1.0
    #: YaRN: strength of the temperature on the softmax scale; 0 leaves it to `mscale` alone.
    mscale_all_dim: float = 0.0
    #: llama3: pairs that turn less often than this in the original context are interpolated.
    low_freq_factor: float = 1.0
    #: llama3: pairs that turn more often than this in the original context keep their frequency.
    high_freq_factor: float = 4.0


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, in fp32, magnitude included."""

    cos: Float[Tensor, "B S P"]
    sin: Float[Tensor, "B S P"]


def check_rope(config: RopeConfig) -> None:
    """Refuse, with a ValueError, settings under which no rotation exists."""
    if config.theta <= 1.0 or config.original_seq_len < 1:
        raise ValueError(
            f"model.rope.theta={config.theta} must exceed 1 and model.rope.original_seq_len="
            f"{config.original_seq_len} be at least 1; 10000 and 4096 are usual"
        )
    if config.factor < 1.0:
        raise ValueError(
            f"model.rope.factor={config.factor} shrinks the context; choose a factor >= 1"
        )
    if config.scaling is RopeScaling.none and config.factor != 1.0:
        raise ValueError(
            f"model.rope.factor={config.factor} has no effect with model.rope.scaling=none; "
            "set model.rope.scaling or leave the factor at 1"
        )
    if not config.low_freq_factor < config.high_freq_factor:
        raise ValueError(
            f"model.rope.low_freq_factor={config.low_freq_factor} must be below "
            f"model.rope.high_freq_factor={config.high_freq_factor}"
        )


def rotation(config: RopeConfig, positions: Int64[Tensor, "B S"], *, dim: int) -> Rotation:
    """Cosine and sine for each position; fp32 whatever the model's precision."""
    with positions.device:
        frequencies = pair_frequencies(config, dim=dim)
    angles = positions[..., None].float() * frequencies
    magnitude = _temperature(config, config.mscale)
    if config.mscale_all_dim:
        magnitude /= _temperature(config, config.mscale_all_dim)
    return Rotation(angles.cos() * magnitude, angles.sin() * magnitude)


def rotate_pairs(x: Float[Tensor, "B S H R"], by: Rotation) -> Float[Tensor, "B S H R"]:
    """Turn the pairs (x0, x1), (x2, x3), ... of `x`: DeepSeek's published MLA weights."""
    x32 = x.float().contiguous()  # a slice at an odd place has no view as pairs
    pairs = torch.view_as_complex(x32.unflatten(-1, (-1, 2)))  # [B, S, H, P]
    turned = pairs * torch.complex(by.cos, by.sin)[:, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _halves(like: Tensor) -> tuple[Tensor, Rotation]:
    angles = like.detach().float().view(4, 4, 4)[:, :2]
    return like.view(4, 2, 1, 8), Rotation(angles, angles)


@region(_halves)
def rotate_halves(x: Float[Tensor, "B S H R"], by: Rotation) -> Float[Tensor, "B S H R"]:
    """Turn the pairs (x0, xP), (x1, xP+1), ... of `x`: Llama's and Qwen2's published weights."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def turn_tail(x: Float[Tensor, "B S H K"], by: Rotation) -> Float[Tensor, "B S H K"]:
    """`x` whose heads' last R are turned as by `rotate_pairs`; what stands before stays."""
    if choose_rope(x.device).backend is Backend.triton:
        from model.kernels import rope

        return rope.turn_tail(x, by.cos, by.sin)
    plain, tail = x.split((x.shape[-1] - 2 * by.cos.shape[-1], 2 * by.cos.shape[-1]), dim=-1)
    return torch.cat((plain, rotate_pairs(tail, by)), dim=-1)


def join_turned(
    plain: Float[Tensor, "B S H N"], shared: Float[Tensor, "B S 1 R"], by: Rotation
) -> Float[Tensor, "B S H K"]:
    """Each head of `plain`, and behind it `shared`, turned as by `rotate_pairs`: K = N + R."""
    if choose_rope(plain.device).backend is Backend.triton:
        from model.kernels import rope

        return rope.join_turned(plain, shared, by.cos, by.sin)
    turned = rotate_pairs(shared, by).expand(-1, -1, plain.shape[2], -1)
    return torch.cat((plain, turned), dim=-1)


def softmax_temperature(config: RopeConfig) -> float:
    """Factor on the attention's softmax scale: the square of YaRN's mscale_all_dim term."""
    if config.mscale_all_dim == 0.0:
        return 1.0
    return _temperature(config, config.mscale_all_dim) ** 2


def pair_frequencies(config: RopeConfig, *, dim: int) -> Float[Tensor, " P"]:
    """Radians per position of each pair: as trained, divided by the factor, or in between."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    original = 1.0 / config.theta**exponents
    interpolated = original / config.factor
    match config.scaling:
        case RopeScaling.none:
            return original
        case RopeScaling.linear:
            return interpolated
        case RopeScaling.yarn:
            kept = 1 - _yarn_ramp(config, dim=dim)
        case RopeScaling.llama3:
            turns = config.original_seq_len * original / (2 * math.pi)
            span = config.high_freq_factor - config.low_freq_factor
            kept = ((turns - config.low_freq_factor) / span).clamp(0, 1)
    return interpolated * (1 - kept) + original * kept


def _yarn_ramp(config: RopeConfig, *, dim: int) -> Float[Tensor, " P"]:
    """How far each pair is interpolated: 0 for the fastest, 1 for the slowest."""
    low = math.floor(_pair_turning(config, config.beta_fast, dim=dim))
    high = math.ceil(_pair_turning(config, config.beta_slow, dim=dim))
    low, high = max(low, 0), min(high, dim - 1)
    span = max(high - low, 0.001)  # 0.001: as in the reference, when both ends meet
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)


def _pair_turning(config: RopeConfig, turns: float, *, dim: int) -> float:
    """The (fractional) pair that completes `turns` rotations within the original context."""
    wavelength = config.original_seq_len / (turns * 2 * math.pi)
    return dim * math.log(wavelength) / (2 * math.log(config.theta))


def _temperature(config: RopeConfig, strength: float) -> float:
    """YaRN's attention temperature, 0.1 * strength * ln(factor) + 1."""
    if config.scaling is not RopeScaling.yarn:
        return 1.0
    return 0.1 * strength * math.log(config.factor) + 1.0
