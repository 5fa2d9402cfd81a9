"""Names and config.json against what transformers itself writes and reads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from model.config import GQAModelConfig, ModelConfig, MTPConfig
from model.rope import RopeConfig, RopeScaling
from model.router import GroupScore, RouterConfig, Score
from tests.command import compose
from tests.train.hub.families import FAMILIES, LINEAR, SOFTMAX, YARN, dense, moe
from tests.train.tiny import tiny_model
from train.hub.config import HubConfig, family_of, from_hub_config, to_hub_config
from train.hub.dtype import HubDtype, stored_specs
from train.hub.names import hub_tensors
from train.hub.rope import from_hub_rope, to_hub_rope


def described(config: ModelConfig, folder: Path) -> transformers.PretrainedConfig:
    """The config as transformers reads it."""
    (folder / "config.json").write_text(json.dumps(to_hub_config(config, max_seq_len=64)))
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_are_those_that_transformers_saves(name: str, tmp_path: Path) -> None:
    config = FAMILIES[name]
    theirs = transformers.AutoModelForCausalLM.from_config(described(config, tmp_path))
    theirs.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    main = replace(config, mtp=MTPConfig(depth=0))  # it saves no MTP
    ours = {tensor.name: tensor.shape for tensor in hub_tensors(main, family_of(main))}
    assert ours == saved


def test_mtp_is_stored_as_in_the_published_weights() -> None:
    config = tiny_model()
    names = {tensor.name for tensor in hub_tensors(config, family_of(config))}
    block = "input_layernorm post_attention_layernorm self_attn.q_a_proj self_attn.q_a_layernorm "
    block += "self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_a_layernorm "
    block += "self_attn.kv_b_proj self_attn.o_proj mlp.gate mlp.shared_experts.gate_proj "
    block += "mlp.shared_experts.up_proj mlp.shared_experts.down_proj "
    own = "enorm hnorm eh_proj embed_tokens shared_head.norm shared_head.head"
    wanted = {f"{module}.weight" for module in (block + own).split()}
    wanted |= {f"mlp.experts.{e}.{m}_proj.weight" for e in range(8) for m in ("gate", "up", "down")}
    wanted |= {"mlp.gate.e_score_correction_bias"}
    found = {name.removeprefix("model.layers.3.") for name in names if "layers.3." in name}
    assert found == wanted


def test_v3_in_fp8_has_the_published_folder_s_tensors_to_the_byte() -> None:
    config = compose("model=v3").model
    tensors = hub_tensors(config, family_of(config))
    specs = {s.name: s for tensor in tensors for s in stored_specs(tensor, HubDtype.fp8)}
    assert len(specs) == 91_991  # entries of deepseek-ai/DeepSeek-V3's index
    assert sum(spec.num_bytes for spec in specs.values()) == 688_574_839_360
    scales = specs["model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv"]
    assert scales.shape == (5, 56)
    assert specs["model.layers.61.eh_proj.weight"].dtype == torch.bfloat16
    assert specs["model.layers.3.mlp.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_comes_back_from_its_config_json(name: str) -> None:
    config = FAMILIES[name]
    values = HubConfig(json.loads(json.dumps(to_hub_config(config, max_seq_len=64))))
    back = from_hub_config(values, mtp_depth=config.mtp.depth)
    same = replace(config, rope=back.rope, moe=back.moe)  # compared apart, below
    assert back == same
    if config.moe is not None and back.moe is not None:
        of_training = {"balance_loss_weight": config.moe.balance_loss_weight}
        speed = config.moe.router.bias_update_speed
        router = replace(back.moe.router, bias_update_speed=speed)
        if router.num_groups == 1:
            router = replace(router, group_score=config.moe.router.group_score)
        assert replace(back.moe, router=router, **of_training) == config.moe


ROPES = {
    "none": RopeConfig(theta=123.0),
    "linear": LINEAR,
    "yarn": YARN,
    "yarn_mscale": replace(YARN, mscale=0.7),
    "yarn_v3": replace(YARN, mscale_all_dim=1.0),
    "yarn_all": replace(YARN, mscale=0.707, mscale_all_dim=0.3, beta_fast=16.0, beta_slow=2.0),
    "yarn_softmax": replace(YARN, mscale=0.0, mscale_all_dim=0.3),
}


@pytest.mark.parametrize("is_latent", [True, False], ids=["latent", "grouped"])
@pytest.mark.parametrize("name", ROPES)
def test_a_rotation_comes_back_from_its_rope_parameters(name: str, is_latent: bool) -> None:
    rope = ROPES[name]
    values = {"rope_parameters": to_hub_rope(rope, is_latent=is_latent)}
    back = from_hub_rope(values | {"max_position_embeddings": 64}, is_latent=is_latent)
    assert back.mscale == pytest.approx(rope.mscale)
    if not is_latent:  # there one strength says it all
        rope = replace(rope, mscale_all_dim=0.0)
    assert replace(back, mscale=rope.mscale) == rope


def test_the_old_form_of_rope_settings_is_read() -> None:
    old = {
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    }
    assert from_hub_rope(old, is_latent=True) == RopeConfig(
        theta=1e4,
        scaling=RopeScaling.yarn,
        factor=40.0,
        original_seq_len=4096,
        mscale=1.0,
        mscale_all_dim=1.0,
    )


V2 = tiny_model(moe=moe(SOFTMAX), mtp=MTPConfig(depth=0))
IMPOSSIBLE: dict[str, tuple[ModelConfig, str]] = {
    "eps": (tiny_model(norm_eps=1e-5), r"model.norm_eps=1e-05 differs from 1e-06"),
    "groups": (
        tiny_model(
            moe=moe(RouterConfig(num_groups=4, top_groups=2, group_score=GroupScore.max)),
        ),
        r"model.moe.router.group_score=max differs from top2_sum",
    ),
    "unshared": (
        tiny_model(moe=moe(RouterConfig(), num_shared_experts=0)),
        r"model.moe.num_shared_experts=0",
    ),
    "v2_bias": (
        replace(V2, moe=moe(RouterConfig(score=Score.softmax, renormalise=False))),
        r"model.moe.router.bias=true does not exist in deepseek_v2",
    ),
    "v2_mtp": (
        replace(V2, mtp=MTPConfig(depth=1)),
        r"model.mtp.depth=1 has no place in deepseek_v2; leave MTP out with mtp=false",
    ),
    "gqa_experts": (
        GQAModelConfig(
            vocab_size=8,
            dim=8,
            num_layers=2,
            ffn_dim=8,
            moe=moe(RouterConfig()),
            attention=dense(YARN, qkv_bias=False, tie_embedding=False).attention,
        ),
        r"model.num_dense_layers=1 leaves MoE layers, but llama has none",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_architecture_computes_is_refused(name: str) -> None:
    config, message = IMPOSSIBLE[name]
    with pytest.raises(ValueError, match=message):
        family_of(config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("v3", {"model_type": "mamba"}, r"model_type=mamba .* one of deepseek_v2, deepseek_v3"),
        ("v3", {"hidden_act": "gelu"}, r"hidden_act=gelu .* must have silu"),
        ("v3", {"scoring_func": "softmax"}, r"scoring_func=softmax"),
        ("v3", {"rms_norm_eps": 1e-5}, r"rms_norm_eps=1e-05 differs"),
        ("v2", {"norm_topk_prob": True}, r"norm_topk_prob=True"),
        ("llama", {"attention_bias": True}, r"attention_bias=True"),
        ("qwen2", {"use_sliding_window": True}, r"use_sliding_window=True"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, r"rope_type=dynamic does not exist"),
    ],
)
def test_a_config_json_that_asks_for_what_does_not_exist_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    values = to_hub_config(FAMILIES[name], max_seq_len=64)
    with pytest.raises(ValueError, match=message):
        from_hub_config(HubConfig(values | changes), mtp_depth=0)


def test_a_key_that_is_missing_is_named() -> None:
    values = to_hub_config(FAMILIES["v3"], max_seq_len=64)
    del values["kv_lora_rank"]
    with pytest.raises(ValueError, match=r"config.json lacks kv_lora_rank"):
        from_hub_config(HubConfig(values), mtp_depth=0)
