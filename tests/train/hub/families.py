"""A tiny model of every architecture that the hub knows, by name."""

from dataclasses import replace

from model.config import GQAModelConfig, ModelConfig, MTPConfig
from model.gqa import GQAConfig
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.rope import RopeConfig, RopeScaling
from model.router import GroupScore, RouterConfig, Score
from tests.train.tiny import tiny_model

GROUPED = RouterConfig(num_groups=4, top_groups=2, scale=2.5)
SOFTMAX = RouterConfig(score=Score.softmax, renormalise=False, bias=False)
YARN = RopeConfig(scaling=RopeScaling.yarn, factor=4.0, original_seq_len=8)


def moe(router: RouterConfig, *, num_shared_experts: int = 1) -> MoEConfig:
    return MoEConfig(
        num_experts=8, top_k=2, expert_dim=16, num_shared_experts=num_shared_experts, router=router
    )


def latent(q_lora_rank: int | None) -> MLAConfig:
    return MLAConfig(
        num_heads=2,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        nope_head_dim=8,
        rope_head_dim=4,
        v_head_dim=6,
    )


def dense(rope: RopeConfig, *, qkv_bias: bool, tie_embedding: bool) -> GQAModelConfig:
    return GQAModelConfig(
        vocab_size=512,
        dim=32,
        num_layers=2,
        num_dense_layers=2,
        ffn_dim=48,
        norm_eps=1e-5,
        tie_embedding=tie_embedding,
        rope=rope,
        attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=12, qkv_bias=qkv_bias),
    )


NO_MTP = MTPConfig(depth=0)
LLAMA3 = RopeConfig(theta=5e5, scaling=RopeScaling.llama3, factor=8.0, original_seq_len=8)
LINEAR = RopeConfig(theta=1e5, scaling=RopeScaling.linear, factor=4.0)
FAMILIES: dict[str, ModelConfig] = {
    "v3": tiny_model(moe=moe(GROUPED), rope=replace(YARN, mscale_all_dim=1.0)),
    "v3_two_mtp_depths": tiny_model(mtp=MTPConfig(depth=2), tie_embedding=True),
    "v3_without_query_compression": tiny_model(
        attention=latent(None), mtp=NO_MTP, rope=replace(YARN, mscale=0.7)
    ),
    "v3_without_experts": tiny_model(num_dense_layers=3, moe=None),
    "v2": tiny_model(
        moe=moe(SOFTMAX, num_shared_experts=2),
        attention=latent(12),
        mtp=NO_MTP,
        rope=replace(YARN, factor=40.0, mscale=0.707, mscale_all_dim=0.707),
    ),
    "v2_grouped": tiny_model(
        moe=moe(replace(SOFTMAX, num_groups=4, top_groups=2, group_score=GroupScore.max)),
        attention=latent(None),
        mtp=NO_MTP,
        rope=replace(YARN, mscale_all_dim=0.5),
    ),
    "llama": dense(LLAMA3, qkv_bias=False, tie_embedding=False),
    "llama_linear": dense(LINEAR, qkv_bias=False, tie_embedding=True),
    "qwen2": dense(RopeConfig(theta=1e6), qkv_bias=True, tie_embedding=True),
    "qwen2_yarn": dense(
        replace(YARN, mscale=0.8, mscale_all_dim=0.5), qkv_bias=True, tie_embedding=False
    ),
}
