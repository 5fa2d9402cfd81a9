"""transformers' DeepSeek models in our terms: one table of names, one of config keys."""

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config

from model.config import ModelConfig
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.rope import RopeConfig, RopeScaling
from model.router import GroupScore, RouterConfig, Score

# Each applies, in this order, to every name of theirs.
NAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.q_a_proj\.", ".attention.q_down."),
    (r"\.self_attn\.q_a_layernorm\.", ".attention.q_norm."),
    (r"\.self_attn\.(q|q_b)_proj\.", ".attention.q_up."),
    (r"\.self_attn\.kv_a_proj_with_mqa\.", ".attention.kv_down."),
    (r"\.self_attn\.kv_a_layernorm\.", ".attention.kv_norm."),
    (r"\.self_attn\.kv_b_proj\.", ".attention.kv_up."),
    (r"\.self_attn\.o_proj\.", ".attention.out."),
    (r"\.self_attn\.k_proj\.", ".attention.key."),
    (r"\.self_attn\.v_proj\.", ".attention.value."),
    (r"\.mlp\.gate\.weight$", ".ffn.router.weight"),
    (r"\.mlp\.gate\.e_score_correction_bias$", ".ffn.router.bias"),
    (r"\.mlp\.shared_experts\.", ".ffn.shared."),
    (r"\.mlp\.", ".ffn."),
    (r"\.(gate|up|down)_proj", r".\1"),
)


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights, or their weights' gradients, under our names."""
    translated: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        stack, is_pair, _ = name.partition("gate_up_proj")
        if is_pair:
            translated[f"{stack}gate"], translated[f"{stack}up"] = tensor.chunk(2, dim=1)
        else:
            translated[name] = tensor
    return translated


def our_config(theirs: DeepseekV2Config | DeepseekV3Config) -> ModelConfig:
    """The same model, in our terms."""
    is_v3 = isinstance(theirs, DeepseekV3Config)
    rope = theirs.rope_parameters
    is_grouped = is_v3 or theirs.topk_method == "group_limited_greedy"
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        dim=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_dense_layers=theirs.first_k_dense_replace,
        ffn_dim=theirs.intermediate_size,
        norm_eps=theirs.rms_norm_eps,
        attention=MLAConfig(
            num_heads=theirs.num_attention_heads,
            q_lora_rank=theirs.q_lora_rank,
            kv_lora_rank=theirs.kv_lora_rank,
            nope_head_dim=theirs.qk_nope_head_dim,
            rope_head_dim=theirs.qk_rope_head_dim,
            v_head_dim=theirs.v_head_dim,
        ),
        rope=RopeConfig(
            theta=rope["rope_theta"],
            scaling=RopeScaling.yarn if rope["rope_type"] == "yarn" else RopeScaling.none,
            factor=rope.get("factor", 1.0),
            original_seq_len=rope.get("original_max_position_embeddings", 4096),
            beta_fast=rope.get("beta_fast", 32.0),
            beta_slow=rope.get("beta_slow", 1.0),
            mscale=rope.get("mscale", 1.0),
            mscale_all_dim=rope.get("mscale_all_dim", 0.0),
        ),
        moe=MoEConfig(
            num_experts=theirs.n_routed_experts,
            top_k=theirs.num_experts_per_tok,
            expert_dim=theirs.moe_intermediate_size,
            num_shared_experts=theirs.n_shared_experts,
            router=RouterConfig(
                score=Score.sigmoid if is_v3 else Score.softmax,
                renormalise=is_v3 and theirs.norm_topk_prob,
                scale=theirs.routed_scaling_factor,
                num_groups=theirs.n_group if is_grouped else 1,
                top_groups=theirs.topk_group if is_grouped else 1,
                group_score=GroupScore.top2_sum if is_v3 else GroupScore.max,
                bias=is_v3,
            ),
        ),
    )
