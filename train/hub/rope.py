"""RoPE's settings in config.json: `rope_parameters` today, `rope_scaling` and `rope_theta` before.

YaRN's temperature is the point where names alone do not carry over. Ours is two strengths: one
for cosine and sine, one for the softmax (`model.rope`). transformers knows the second for latent
attention only; what differs from its defaults is written as `attention_factor`, its factor on
cosine and sine. Where a whole head is rotated, that factor can stand for both.
"""

import math
from typing import Any

from model.rope import RopeConfig, RopeScaling


def to_hub_rope(rope: RopeConfig, *, is_latent: bool) -> dict[str, Any]:
    """`rope_parameters` for the same rotation; `is_latent` where only a slice of a head turns."""
    kind = "default" if rope.scaling is RopeScaling.none else rope.scaling.value
    values: dict[str, Any] = {"rope_type": kind, "rope_theta": rope.theta}
    if rope.scaling is RopeScaling.none:
        return values
    values["factor"] = rope.factor
    if rope.scaling in (RopeScaling.yarn, RopeScaling.llama3):
        values["original_max_position_embeddings"] = rope.original_seq_len
    if rope.scaling is RopeScaling.llama3:
        values["low_freq_factor"] = rope.low_freq_factor
        values["high_freq_factor"] = rope.high_freq_factor
    if rope.scaling is RopeScaling.yarn:
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        values |= _to_hub_temperature(rope, is_latent=is_latent)
    return values


def from_hub_rope(config: dict[str, Any], *, is_latent: bool) -> RopeConfig:
    """The rotation that a config.json asks for, in its new or its old form.

    Raises:
        ValueError: It is of a kind that does not exist here.
    """
    values = config.get("rope_scaling") or config.get("rope_parameters") or {}  # their order
    kind = values.get("rope_type", values.get("type", "default"))
    theta = float(values.get("rope_theta", config.get("rope_theta", 10_000.0)))
    if kind == "default":
        return RopeConfig(theta=theta)
    known = [scaling.value for scaling in RopeScaling if scaling is not RopeScaling.none]
    if kind not in known:
        raise ValueError(
            f"config.json: rope_type={kind} does not exist here; it must be one of "
            f"default, {', '.join(known)}"
        )
    if values.get("truncate", True) is not True:
        raise ValueError("config.json: truncate=false in YaRN's settings does not exist here")
    original = RopeConfig().original_seq_len  # linear scaling doesn't ask
    if kind != RopeScaling.linear:
        original = (
            values.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
    rope = RopeConfig(
        theta=theta,
        scaling=RopeScaling(kind),
        factor=float(values.get("factor") or config["max_position_embeddings"] / original),
        original_seq_len=int(original),
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        low_freq_factor=float(values.get("low_freq_factor", 1.0)),
        high_freq_factor=float(values.get("high_freq_factor", 4.0)),
    )
    if rope.scaling is RopeScaling.yarn:
        _set_temperature(rope, values, is_latent=is_latent)
    return rope


def temperature(factor: float, strength: float) -> float:
    """YaRN's attention temperature (arXiv:2309.00071, 3.4)."""
    return 0.1 * strength * math.log(factor) + 1.0


def _to_hub_temperature(rope: RopeConfig, *, is_latent: bool) -> dict[str, float]:
    if not is_latent:  # the softmax's temperature squared is the rotation's on either side
        factor = temperature(rope.factor, rope.mscale)
        return {} if rope.mscale == 1.0 else {"attention_factor": factor}
    values = {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    if rope.mscale and rope.mscale_all_dim:
        return values
    magnitude = temperature(rope.factor, rope.mscale)
    magnitude /= temperature(rope.factor, rope.mscale_all_dim)
    return values | {"attention_factor": magnitude}


def _set_temperature(rope: RopeConfig, values: dict[str, Any], *, is_latent: bool) -> None:
    strength = float(values.get("mscale") or 0.0)
    all_dim = float(values.get("mscale_all_dim") or 0.0)
    magnitude = values.get("attention_factor")
    if magnitude is None and not (strength and all_dim):
        magnitude = temperature(rope.factor, 1.0)  # transformers' default
    rope.mscale_all_dim = all_dim if is_latent else 0.0
    if magnitude is None and is_latent:
        rope.mscale = strength
        return
    if magnitude is None:
        magnitude = temperature(rope.factor, strength) / temperature(rope.factor, all_dim)
    magnitude *= temperature(rope.factor, rope.mscale_all_dim)
    rope.mscale = 1.0
    if not math.isclose(magnitude, temperature(rope.factor, 1.0), rel_tol=1e-12):
        rope.mscale = (magnitude - 1.0) / (0.1 * math.log(rope.factor))
