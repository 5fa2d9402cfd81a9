"""What blocks keep for the backward pass where their products are taken in FP8, in formulas.

As `model/memory.py`, but in bytes, since numbers of several widths are kept: products keep their
input, each its own copy, in E4M3 (attention's output in E5M6) in whole tiles of 128 with a scale
for each; SwiGLU keeps its two inputs so and nothing else. Norms' results, which only products ask
for, are not kept. Recomputation spares neither what products keep outside of `rebuild`, nor the
experts, which compute SwiGLU's result again in any case.
"""

from model.attention import AttentionConfig
from model.config import ModelConfig
from model.fp8 import TILE
from model.gqa import GQAConfig
from model.memory import kept_per_token
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.recompute import Recompute

FP32 = 4


def kept_bytes_per_token(
    config: ModelConfig, *, is_dense: bool, recompute: Recompute, size: int, is_fp8: bool
) -> int:
    """Bytes that a block keeps for each token, its input included; a number that is not in FP8, nor
    part of the routing, takes `size`."""
    if not is_fp8:
        return size * kept_per_token(config, is_dense=is_dense, recompute=recompute)
    if recompute is Recompute.full:
        return size * config.dim
    is_all_kept = recompute is Recompute.none
    residuals = 2 * size * config.dim
    norms = 2 * size if is_all_kept else 0  # what they were divided by
    attention = _attention(config.attention, config.dim, size=size, is_all_kept=is_all_kept)
    if is_dense:
        return residuals + norms + attention + _swiglu(config.dim, config.ffn_dim)
    assert config.moe is not None, "check_model asks for it"
    moe = _moe(config.moe, config.dim, size=size, is_all_kept=is_all_kept)
    return residuals + norms + attention + moe


def in_e4m3(width: int) -> int:
    """Bytes of a row: a byte for each number of its tiles, and their scales."""
    tiles = -(-width // TILE)
    return tiles * (TILE + FP32)


def in_e5m6(width: int) -> int:
    """The same at twelve bits a number."""
    tiles = -(-width // TILE)
    return tiles * (TILE * 3 // 2 + FP32)


def _attention(config: AttentionConfig, dim: int, *, size: int, is_all_kept: bool) -> int:
    heads = config.num_heads
    if isinstance(config, GQAConfig):
        widths = 2 * heads * config.head_dim + 2 * config.num_kv_heads * config.head_dim + heads
        return size * widths + 3 * in_e4m3(dim) + in_e5m6(heads * config.head_dim)
    assert isinstance(config, MLAConfig), "the kinds are two"
    width = config.nope_head_dim + config.rope_head_dim
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank + config.rope_head_dim
    mixed = heads * (width + 1)  # the result of attention and its normaliser
    down = in_e4m3(dim) * (2 if config.q_lora_rank else 1)
    kept = size * (latents + mixed) + down + in_e5m6(heads * config.v_head_dim)
    if not is_all_kept:
        return kept
    norms = 2 if config.q_lora_rank else 1
    turns = 2 * config.rope_head_dim
    up = in_e4m3(config.q_lora_rank or dim) + in_e4m3(config.kv_lora_rank)
    return kept + size * (norms + turns + 3 * heads * width) + up


def _swiglu(dim: int, inner_dim: int) -> int:
    return in_e4m3(dim) + 2 * in_e4m3(inner_dim)


def _moe(config: MoEConfig, dim: int, *, size: int, is_all_kept: bool) -> int:
    routing = FP32 * (config.num_experts + 6 * config.top_k + 3)
    scored = FP32 * dim if is_all_kept else 0  # the router's input in fp32
    outputs = size * config.top_k * dim
    shared = config.num_shared_experts * config.expert_dim
    inside = config.top_k * _swiglu(dim, config.expert_dim)
    return routing + scored + outputs + (_swiglu(dim, shared) if shared else 0) + inside
