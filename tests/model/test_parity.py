"""The whole model against transformers' of every family, weights copied: random configs."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from model.decoding import write_tokens
from model.sampling import SamplingConfig
from tests.model.twins import assert_decoding_equals, assert_parity, build_twins

BATCH, SEQ_LEN = 2, 28
POSITIONS = 64
STRENGTHS = st.sampled_from([0.0, 0.5, 0.707, 1.0])

DEFAULT_ROPE = st.fixed_dictionaries(
    {"rope_type": st.just("default"), "rope_theta": st.sampled_from([1e4, 1e6])}
)
LINEAR = st.fixed_dictionaries(
    {
        "rope_type": st.just("linear"),
        "rope_theta": st.just(1e5),
        "factor": st.sampled_from([2, 4.0]),
    }
)
LLAMA3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        "rope_theta": st.just(5e5),
        "factor": st.sampled_from([2.0, 8.0]),
        "low_freq_factor": st.just(1.0),
        "high_freq_factor": st.sampled_from([2.0, 4.0]),
        "original_max_position_embeddings": st.sampled_from([8, 16]),
    }
)
YARN = st.fixed_dictionaries(
    {
        "rope_type": st.just("yarn"),
        "rope_theta": st.sampled_from([1e3, 1e4]),
        "factor": st.sampled_from([2.0, 4.0, 40.0]),
        "original_max_position_embeddings": st.sampled_from([8, 16]),
        "beta_fast": st.sampled_from([8.0, 32.0]),
        "beta_slow": st.sampled_from([1.0, 2.0]),
    },
    optional={"mscale": STRENGTHS, "mscale_all_dim": STRENGTHS},
)


@st.composite
def common(draw: st.DrawFn) -> dict[str, Any]:
    """Settings that every family has."""
    return {
        "vocab_size": draw(st.integers(50, 150)),
        "intermediate_size": draw(st.integers(20, 60)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.15,
        "tie_word_embeddings": draw(st.booleans()),
        "use_cache": False,
    }


@st.composite
def latent(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of V2 and V3: attention, and experts in groups of which a token visits some."""
    num_heads = draw(st.integers(1, 3))
    num_groups, group_size = draw(st.sampled_from([(1, 8), (2, 4), (4, 2), (4, 3), (3, 4)]))
    top_groups = draw(st.integers(1, num_groups))
    return draw(common()) | {
        "hidden_size": num_heads * draw(st.integers(10, 20)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "q_lora_rank": draw(st.none() | st.integers(6, 14)),
        "kv_lora_rank": 2 * draw(st.integers(4, 10)),
        "qk_nope_head_dim": 2 * draw(st.integers(4, 8)),
        "qk_rope_head_dim": 2 * draw(st.integers(2, 5)),
        "v_head_dim": draw(st.integers(5, 12)),
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "moe_intermediate_size": draw(st.integers(8, 24)),
        "n_shared_experts": draw(st.integers(1, 2)),
        "n_routed_experts": num_groups * group_size,
        "n_group": num_groups,
        "topk_group": top_groups,
        "num_experts_per_tok": draw(st.integers(1, min(4, top_groups * group_size))),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 16.0])),
        "rope_parameters": draw(DEFAULT_ROPE | YARN),
    }


@st.composite
def v3(draw: st.DrawFn) -> PretrainedConfig:
    values = draw(latent())
    # A single weight divided by itself is 1: its router's gradient is rounding on both sides.
    is_normed = values["num_experts_per_tok"] > 1 and draw(st.booleans())
    return DeepseekV3Config(**values, norm_topk_prob=is_normed)


@st.composite
def v2(draw: st.DrawFn) -> PretrainedConfig:
    """V2-Lite chooses among all experts ("greedy") and has no query compression."""
    method = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    return DeepseekV2Config(**draw(latent()), topk_method=method)


@st.composite
def dense(draw: st.DrawFn) -> PretrainedConfig:
    """llama's or qwen2's; a query head may share its keys with all others, some or none."""
    num_kv_heads, share = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1), (4, 1), (2, 3)]))
    num_heads = num_kv_heads * share
    values = draw(common()) | {
        "hidden_size": num_heads * 2 * draw(st.integers(3, 6)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "rope_parameters": draw(DEFAULT_ROPE | LINEAR | LLAMA3 | YARN),
    }
    return draw(st.sampled_from([LlamaConfig, Qwen2Config]))(**values)


FAMILIES = {"v2": v2(), "v3": v3(), "dense": dense()}
# The same configs on every run; the first that fails is printed, for shrinking takes minutes.
FEW = settings(
    max_examples=16,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=300)


def check_family(config: PretrainedConfig, data: st.DataObject) -> None:
    """Logits, gradients, and generation over the cache."""
    twins = build_twins(config)
    tokens, targets = torch.randint(config.vocab_size, (2, BATCH, SEQ_LEN))
    assert_parity(twins, tokens, targets)
    cuts = sorted(data.draw(st.sets(st.integers(1, SEQ_LEN - 1), max_size=4), label="cuts"))
    steps = [end - start for start, end in zip([0, *cuts], [*cuts, SEQ_LEN], strict=True)]
    assert_decoding_equals(twins, tokens, steps=steps)
    check_generation(twins.theirs, twins.ours, tokens[0, :5].tolist())


def check_generation(theirs: Any, ours: Any, prompt: list[int]) -> None:
    """Greedy tokens from our cache against full passes of ours, and against transformers' own."""
    passes = write_tokens(
        ours, [prompt], sampling=SamplingConfig(temperature=0.0), max_new_tokens=6, eos_id=-1
    )
    written = [token for one in passes for token in one.tokens[0]]
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat((tokens, ours.logits(tokens)[:, -1:].argmax(-1)), dim=1)
    assert written == tokens[0, len(prompt) :].tolist()
    generated = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=6,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert written == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@FEW
@given(data=st.data())
def test_logits_gradients_and_generation_equal_transformers(
    family: str, data: st.DataObject
) -> None:
    check_family(data.draw(FAMILIES[family], label="config"), data)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@MANY
@given(data=st.data())
def test_logits_gradients_and_generation_equal_transformers_in_many_shapes(
    family: str, data: st.DataObject
) -> None:
    check_family(data.draw(FAMILIES[family], label="config"), data)
