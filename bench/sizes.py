"""Sizes that are measured: published widths on a GPU, divided by a factor on a CPU."""

from dataclasses import replace
from typing import NamedTuple

import torch

from model.config import MLAModelConfig, ModelConfig
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.router import RouterConfig

# arXiv:2405.04434, appendix B, but for its layers: 5 of 27.
V2_LITE = MLAModelConfig(
    vocab_size=102_400,
    dim=2048,
    num_layers=5,
    ffn_dim=10_944,
    attention=MLAConfig(
        num_heads=16, kv_lora_rank=512, nope_head_dim=128, rope_head_dim=64, v_head_dim=128
    ),
    moe=MoEConfig(
        num_experts=64, top_k=6, expert_dim=1408, num_shared_experts=2, router=RouterConfig()
    ),
)
# arXiv:2412.19437, 4.2, with the experts that a rank has under EP 8: 32 of 256.
V3 = MLAModelConfig(
    vocab_size=129_280,
    dim=7168,
    num_layers=2,
    ffn_dim=18_432,
    attention=MLAConfig(
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        nope_head_dim=128,
        rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=MoEConfig(num_experts=32, top_k=8, expert_dim=2048, router=RouterConfig(scale=2.5)),
)


class Sizes(NamedTuple):
    """What a whole step is measured in."""

    model: ModelConfig
    batch_size: int
    seq_len: int


class Case(NamedTuple):
    """What a single layer is measured in."""

    name: str
    config: MLAModelConfig
    batch_size: int
    seq_len: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


def layer_cases(device: torch.device) -> list[Case]:
    """What single layers are measured in."""
    if device.type == "cuda":
        return [
            Case("V2-Lite", V2_LITE, 2, 4096, torch.bfloat16),
            Case("V3, 32 of 256 experts", V3, 1, 4096, torch.bfloat16),
        ]
    return [
        Case("V2-Lite / 4", narrowed(V2_LITE, 4), 2, 512, torch.float32),
        Case("V3 / 8, 32 of 256 experts", narrowed(V3, 8), 1, 512, torch.float32),
    ]


def narrowed(config: MLAModelConfig, factor: int) -> MLAModelConfig:
    """Widths and heads divided by the factor; a head's own widths and all counts stay."""
    assert config.moe is not None
    attention = config.attention
    rank = attention.q_lora_rank
    return replace(
        config,
        dim=config.dim // factor,
        attention=replace(
            attention,
            num_heads=attention.num_heads // factor,
            q_lora_rank=None if rank is None else rank // factor,
            kv_lora_rank=attention.kv_lora_rank // factor,
        ),
        moe=replace(config.moe, expert_dim=config.moe.expert_dim // factor),
    )
