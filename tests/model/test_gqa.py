"""Dense models against transformers' Llama and Qwen2: logits, gradients, generation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from model.cache import Cache
from model.config import GQAModelConfig, check_model
from model.gqa import GQAConfig
from model.rope import RopeConfig, RopeScaling
from model.transformer import Transformer
from tests.model import deepseek

SEQ_LEN = 24

ROPES: dict[str, tuple[dict[str, Any], RopeConfig]] = {
    "none": ({"rope_type": "default", "rope_theta": 1e4}, RopeConfig()),
    "linear": (
        {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
        RopeConfig(theta=1e5, scaling=RopeScaling.linear, factor=4.0),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        RopeConfig(theta=5e5, scaling=RopeScaling.llama3, factor=8.0, original_seq_len=16),
    ),
    "yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        RopeConfig(scaling=RopeScaling.yarn, factor=4.0, original_seq_len=16),
    ),
}


def pair(*, kv_heads: int, rope: str, is_tied: bool, is_qwen: bool) -> tuple[Any, Transformer]:
    """A random model of theirs and the same weights in ours."""
    theirs_rope, our_rope = ROPES[rope]
    sizes: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "rope_parameters": dict(theirs_rope),
        "tie_word_embeddings": is_tied,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model_class: Any = Qwen2ForCausalLM if is_qwen else LlamaForCausalLM
    theirs = model_class((Qwen2Config if is_qwen else LlamaConfig)(**sizes))
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    config = GQAModelConfig(
        vocab_size=60,
        dim=32,
        num_layers=2,
        num_dense_layers=2,
        ffn_dim=40,
        tie_embedding=is_tied,
        attention=GQAConfig(num_heads=4, num_kv_heads=kv_heads, head_dim=8, qkv_bias=is_qwen),
        rope=our_rope,
    )
    check_model(config)
    ours = Transformer(config)
    state = {k: v for k, v in theirs.state_dict().items() if not (is_tied and "lm_head" in k)}
    ours.load_state_dict(translate(state))
    return theirs, ours


def translate(tensors: dict[str, Any]) -> dict[str, Any]:
    """As for DeepSeek, but there is no low-rank query here."""
    return {
        name.replace("q_up", "query"): tensor
        for name, tensor in deepseek.translate(tensors).items()
    }


def assert_close(got: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, f"{what} differs by {error:.1e}"


@settings(max_examples=12, deadline=None)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    rope=st.sampled_from(sorted(ROPES)),
    is_tied=st.booleans(),
    is_qwen=st.booleans(),
)
def test_logits_and_all_gradients_equal_transformers(
    kv_heads: int, rope: str, is_tied: bool, is_qwen: bool
) -> None:
    theirs, ours = pair(kv_heads=kv_heads, rope=rope, is_tied=is_tied, is_qwen=is_qwen)
    tokens, targets = torch.randint(60, (2, 2, SEQ_LEN))
    logits = theirs(tokens).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    positions = torch.arange(SEQ_LEN).expand_as(tokens)
    is_real = torch.ones_like(tokens, dtype=torch.bool)
    ours(tokens, targets, positions, is_real, segments=[SEQ_LEN] * 2).loss.backward()
    with torch.no_grad():
        assert_close(ours.logits(tokens), logits)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, grad in translate(grads).items():
        got = ours.get_parameter(name).grad
        assert got is not None
        if grad.abs().max() > 1e-4:  # a key's bias moves no softmax: its gradient is rounding
            assert_close(got, grad, name)


@pytest.mark.parametrize("steps", [[SEQ_LEN], [1] * SEQ_LEN, [9, 1, 12, 1, 1]])
@torch.no_grad()
def test_decoding_in_any_steps_equals_the_full_forward(steps: list[int]) -> None:
    _, ours = pair(kv_heads=2, rope="llama3", is_tied=False, is_qwen=True)
    tokens = torch.randint(60, (3, SEQ_LEN))
    caches = [Cache(capacity=SEQ_LEN) for _ in ours.layers]
    states = [ours.decode(new, caches) for new in tokens.split(steps, dim=1)]
    assert_close(ours.predict(torch.cat(states, dim=1)), ours.logits(tokens))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_kv_heads", 3, r"num_kv_heads=3 does not divide model.attention.num_heads=4"),
        ("head_dim", 7, r"model.attention.head_dim=7 is odd"),
        ("num_heads", 0, r"model.attention.num_heads=0"),
    ],
)
def test_heads_that_cannot_be_shared_are_refused(key: str, value: int, message: str) -> None:
    _, ours = pair(kv_heads=2, rope="none", is_tied=False, is_qwen=False)
    setattr(ours.config.attention, key, value)
    with pytest.raises(ValueError, match=message):
        check_model(ours.config)


def test_a_model_without_experts_must_be_dense_throughout() -> None:
    _, ours = pair(kv_heads=2, rope="none", is_tied=False, is_qwen=False)
    ours.config.num_dense_layers = 1
    with pytest.raises(ValueError, match=r"model.moe=null, but only model.num_dense_layers=1"):
        check_model(ours.config)
