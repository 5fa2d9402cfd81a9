"""Every model that a preset names has the published sizes, to the last parameter.

Three ways to each count: ours on the meta device, transformers' own model with the published
config on the meta device, and the number that is published.
"""

import re
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    Qwen2Config,
)

from model.config import ModelConfig
from model.cost import count_parameters, flops_per_token
from model.moe import MoEConfig
from tests.command import compose
from tests.test_experiments import CONFIGS

SHARED_BY_ALL = {"hidden_act": "silu", "tie_word_embeddings": False}


def dense(kind: type[Any], *sizes: Any) -> Any:
    """A dense model's published config.json, in the order of `names`."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    names += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters")
    return kind(**dict(zip(names, sizes, strict=True)), **SHARED_BY_ALL)


def yarn(mscale: float) -> dict[str, Any]:
    return rope(
        1e4,
        "yarn",
        factor=40.0,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=mscale,
        mscale_all_dim=mscale,
        original_max_position_embeddings=4096,
    )


def rope(theta: float, rope_type: str = "default", **more: float) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": rope_type, **more}


CODER_ROPE = rope(1e5, "linear", factor=4.0)
LLAMA_ROPE = rope(
    5e5,
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
V3 = DeepseekV3Config(rope_parameters=yarn(1.0))  # its sizes are transformers' defaults
V2 = DeepseekV2Config(
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    num_attention_heads=128,
    n_routed_experts=160,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    routed_scaling_factor=16.0,
    topk_method="group_limited_greedy",
    n_group=8,
    topk_group=3,
    rope_parameters=yarn(0.707),
)
V2_LITE = DeepseekV2Config(
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    n_routed_experts=64,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    rope_parameters=yarn(0.707),
)


class Published(NamedTuple):
    """`total` is the hub's own count of the weights' elements (its safetensors metadata), V3's
    without the MTP layer; `active` is what the papers say."""

    theirs: Any
    total: int
    active: str = ""


TABLE = {
    "llm_7b": Published(
        dense(LlamaConfig, 102400, 4096, 30, 11008, 32, 32, 1e-6, rope(1e4)), 6_910_365_696
    ),
    "llm_67b": Published(
        dense(LlamaConfig, 102400, 8192, 95, 22016, 64, 8, 1e-6, rope(1e4)), 67_425_001_472
    ),
    "coder_1b3": Published(
        dense(LlamaConfig, 32256, 2048, 24, 5504, 16, 16, 1e-6, CODER_ROPE), 1_346_471_936
    ),
    "coder_6b7": Published(
        dense(LlamaConfig, 32256, 4096, 32, 11008, 32, 32, 1e-6, CODER_ROPE), 6_740_512_768
    ),
    "coder_33b": Published(
        dense(LlamaConfig, 32256, 7168, 62, 19200, 56, 8, 1e-6, CODER_ROPE), 33_342_991_360
    ),
    "v2_lite": Published(V2_LITE, 15_706_484_224, "2.4B"),  # arXiv:2405.04434, appendix B
    "v2": Published(V2, 235_741_434_880, "21B"),  # arXiv:2405.04434
    "coder_v2_lite": Published(V2_LITE, 15_706_484_224, "2.4B"),  # arXiv:2406.11931, table 2
    "coder_v2": Published(V2, 235_741_434_880, "21B"),
    "v3": Published(V3, 671_026_419_200, "37B"),  # arXiv:2412.19437
    "r1": Published(V3, 671_026_419_200, "37B"),
    "r1_distill_qwen_1b5": Published(
        dense(Qwen2Config, 151936, 1536, 28, 8960, 12, 2, 1e-6, rope(1e4)), 1_777_088_000
    ),
    "r1_distill_qwen_7b": Published(
        dense(Qwen2Config, 152064, 3584, 28, 18944, 28, 4, 1e-6, rope(1e4)), 7_615_616_512
    ),
    "r1_distill_qwen_14b": Published(
        dense(Qwen2Config, 152064, 5120, 48, 13824, 40, 8, 1e-5, rope(1e6)), 14_770_033_664
    ),
    "r1_distill_qwen_32b": Published(
        dense(Qwen2Config, 152064, 5120, 64, 27648, 40, 8, 1e-5, rope(1e6)), 32_763_876_352
    ),
    "r1_distill_llama_8b": Published(
        dense(LlamaConfig, 128256, 4096, 32, 14336, 32, 8, 1e-5, LLAMA_ROPE), 8_030_261_248
    ),
    "r1_distill_llama_70b": Published(
        dense(LlamaConfig, 128256, 8192, 80, 28672, 64, 8, 1e-5, LLAMA_ROPE), 70_553_706_496
    ),
}
MODELS_PAGE = CONFIGS.parent / "docs" / "models.md"
RESEARCH = {"moe_100m": 100e6, "moe_1b": 1e9, "moe_3b": 3e9}
OURS = {"demo", "tiny", *RESEARCH}


@cache
def preset(name: str) -> ModelConfig:
    return compose(f"model={name}").model


def test_every_preset_is_in_the_table() -> None:
    assert {path.stem for path in (CONFIGS / "model").glob("*.yaml")} == TABLE.keys() | OURS


@pytest.mark.parametrize("name", TABLE)
def test_a_presets_counts_equal_the_published_ones(name: str) -> None:
    config, published = preset(name), TABLE[name]
    counted = count_parameters(config)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(published.theirs)
    stored = {**dict(theirs.named_parameters()), **routing_biases(theirs)}
    assert counted.total + num_routing_biases(config) == published.total
    assert sum(tensor.numel() for tensor in stored.values()) == published.total

    experts = sum(tensor.numel() for key, tensor in stored.items() if ".experts." in key)
    chosen = 0
    if config.moe is not None:
        chosen = experts * published.theirs.num_experts_per_tok // config.moe.num_experts
    embedding = published.theirs.vocab_size * published.theirs.hidden_size
    unmet = embedding + experts - chosen + num_routing_biases(config)
    assert counted.active == published.total - unmet
    if published.active:
        billions = published.active.removesuffix("B")
        digits = len(billions.partition(".")[2])
        # Half a digit, and a little: V2-Lite's 2.45 became 2.4.
        assert abs(counted.active / 1e9 - float(billions)) < 0.52 * 10**-digits


def routing_biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Theirs are buffers that are stored; ours too."""
    named = model.named_buffers()
    return {name: buffer for name, buffer in named if name.endswith("e_score_correction_bias")}


def num_routing_biases(config: ModelConfig) -> int:
    if config.moe is None or not config.moe.router.bias:
        return 0
    return (config.num_layers - config.num_dense_layers) * config.moe.num_experts


def test_v3s_hub_folder_is_accounted_for_with_its_mtp_layer() -> None:
    """The hub counts 3,918,786,560 BF16 and 680,571,043,840 FP8 elements; beside them fp32 scales
    and routing biases. The MTP layer there repeats embedding and head."""
    counted = count_parameters(preset("v3"))
    repeated = 2 * 129280 * 7168
    assert counted.total + counted.mtp + repeated == 3_918_786_560 + 680_571_043_840
    biases = 59 * 256
    scales = 41_555_600 - biases
    assert counted.total + counted.mtp + repeated + biases + scales == 684_531_386_000


@pytest.mark.parametrize("name", TABLE)
def test_a_presets_other_numbers_are_the_published_ones(name: str) -> None:
    """What no count shows: norms, RoPE and routing."""
    config, theirs = preset(name), TABLE[name].theirs
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.tie_embedding == theirs.tie_word_embeddings
    published = dict(theirs.rope_parameters)
    assert config.rope.theta == published.pop("rope_theta")
    assert config.rope.scaling == published.pop("rope_type").replace("default", "none")
    names = {"original_max_position_embeddings": "original_seq_len"}
    for key, value in published.items():
        if key not in {"type", "attention_factor", "max_position_embeddings"}:
            assert getattr(config.rope, names.get(key, key)) == value, key
    if config.moe is not None:
        check_routing(config.moe, theirs)


def check_routing(moe: MoEConfig, theirs: Any) -> None:
    router = moe.router
    is_v3 = isinstance(theirs, DeepseekV3Config)
    assert router.score == ("sigmoid" if is_v3 else "softmax")
    assert router.bias == is_v3
    assert router.scale == theirs.routed_scaling_factor
    assert router.renormalise == theirs.norm_topk_prob
    if theirs.n_group is not None:
        assert (router.num_groups, router.top_groups) == (theirs.n_group, theirs.topk_group)
    if router.num_groups > 1:
        assert router.group_score == ("top2_sum" if is_v3 else "max")


def test_flops_per_token_equal_those_added_up_by_hand() -> None:
    """Three models at 4096 tokens, every product written out: forward once, backward twice."""
    seen = sum(range(1, 4097)) / 4096  # keys per query, on average

    def swiglu(dim: int, inner: int) -> int:
        return 3 * dim * inner

    v3_attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * (512 + 64) + 512 * 128 * (128 + 128)
    v3_attention += 128 * 128 * 7168 + 128 * (192 + 128) * seen
    v3_moe = v3_attention + 7168 * 256 + (8 + 1) * swiglu(7168, 2048)
    v3 = 3 * (v3_attention + swiglu(7168, 18432)) + 58 * v3_moe + 7168 * 129280
    v3 += v3_moe + 2 * 7168 * 7168 + 7168 * 129280  # MTP
    assert flops_per_token(preset("v3"), seq_len=4096) == 3 * 2 * v3

    lite_attention = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 * 16 * 256 + 16 * 128 * 2048
    lite_attention += 16 * (192 + 128) * seen
    lite_moe = lite_attention + 2048 * 64 + (6 + 2) * swiglu(2048, 1408)
    lite = lite_attention + swiglu(2048, 10944) + 26 * lite_moe + 2048 * 102400
    assert flops_per_token(preset("v2_lite"), seq_len=4096) == 3 * 2 * lite

    qwen_attention = 2 * 3584 * 28 * 128 + 2 * 3584 * 4 * 128 + 28 * (128 + 128) * seen
    qwen = 28 * (qwen_attention + swiglu(3584, 18944)) + 3584 * 152064
    assert flops_per_token(preset("r1_distill_qwen_7b"), seq_len=4096) == 3 * 2 * qwen


@pytest.mark.parametrize("name", RESEARCH)
def test_a_research_size_follows_its_rule(name: str) -> None:
    """docs/models.md states it."""
    config = preset(name)
    assert config.moe is not None
    assert config.dim % 448 == 0
    assert 7 * config.ffn_dim == 18 * config.dim
    assert 7 * config.moe.expert_dim == 2 * config.dim
    assert 56 * config.attention.num_heads == config.dim
    counted = count_parameters(config)
    for layers in (config.num_layers - 1, config.num_layers + 1):
        other = count_parameters(replace(config, num_layers=layers))
        assert abs(counted.total - RESEARCH[name]) < abs(other.total - RESEARCH[name])


@pytest.mark.parametrize("name", RESEARCH)
def test_a_research_sizes_first_line_states_its_counts(name: str) -> None:
    first = (CONFIGS / "model" / f"{name}.yaml").read_text().splitlines()[0]
    stated = [float(number) for number in re.findall(r"([\d.]+) million", first)]
    counted = count_parameters(preset(name))
    assert stated == [round(counted.total / 1e6, 1), round(counted.active / 1e6, 1)]


@pytest.mark.parametrize("name", [*TABLE, *RESEARCH])
def test_the_page_of_models_states_the_counts(name: str) -> None:
    row = next(line for line in MODELS_PAGE.read_text().splitlines() if f"| `{name}` |" in line)
    counted = count_parameters(preset(name))
    assert f"| {counted.total:,} | {counted.active:,} |" in row
