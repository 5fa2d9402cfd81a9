"""transformers' DeepSeek-V3 in the sizes of one of our models, as the peer that is measured."""

from typing import Any

import torch
from torch import nn
from transformers import DeepseekV3Config

from model.config import ModelConfig
from train.hub.config import to_hub_latent

# Ways in which it can compute experts. batched_mm gathers a copy of an expert's weights for every
# row: 9 GB in bench.step's sizes, too much for a GPU's.
EXPERTS_IMPLEMENTATIONS = {
    "cpu": ("eager", "batched_mm", "grouped_mm"),
    "cuda": ("eager", "grouped_mm"),
}


def peer_config(config: ModelConfig, *, seq_len: int, experts: str) -> DeepseekV3Config:
    """The same sizes; RoPE over interleaved pairs, attention by torch's kernels."""
    assert config.moe is not None
    theirs = DeepseekV3Config(
        **their_sizes(config, seq_len=seq_len),
        initializer_range=config.init_std,
        routed_scaling_factor=config.moe.router.scale,
    )
    theirs._attn_implementation = "sdpa"
    theirs._experts_implementation = experts
    return theirs


def their_sizes(config: ModelConfig, *, seq_len: int) -> dict[str, Any]:
    """The sizes by the names that transformers' DeepSeek configs have for them."""
    attention: Any = config.attention
    assert config.moe is not None
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "first_k_dense_replace": config.num_dense_layers,
        "intermediate_size": config.ffn_dim,
        "num_attention_heads": attention.num_heads,
        **to_hub_latent(attention),
        "n_routed_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "moe_intermediate_size": config.moe.expert_dim,
        "n_shared_experts": config.moe.num_shared_experts,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": seq_len,
        "use_cache": False,
    }


def fill(module: nn.Module, std: float) -> None:
    """Random weights for a module that was made without a model around it."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
