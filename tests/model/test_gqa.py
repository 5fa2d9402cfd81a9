"""What grouped-query attention refuses, and decoding token by token; the rest: test_parity.py."""

import pytest
import torch
from transformers import Qwen2Config

from model.config import check_model
from model.transformer import Transformer
from tests.model.twins import Twins, assert_decoding_equals, build_twins

SEQ_LEN = 24


@pytest.fixture
def twins() -> Twins:
    """Two query heads share one of keys and values; frequencies are cut as llama3 does."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    return build_twins(
        Qwen2Config(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rope_parameters=rope,
            initializer_range=0.2,
        )
    )


@pytest.fixture
def ours(twins: Twins) -> Transformer:
    return twins.ours


@pytest.mark.parametrize("steps", [[SEQ_LEN], [1] * SEQ_LEN, [9, 1, 12, 1, 1]])
def test_decoding_in_any_steps_equals_the_full_forward(twins: Twins, steps: list[int]) -> None:
    assert_decoding_equals(twins, torch.randint(60, (3, SEQ_LEN)), steps=steps)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_kv_heads", 3, r"num_kv_heads=3 does not divide model.attention.num_heads=4"),
        ("head_dim", 7, r"model.attention.head_dim=7 is odd"),
        ("num_heads", 0, r"model.attention.num_heads=0"),
    ],
)
def test_heads_that_cannot_be_shared_are_refused(
    ours: Transformer, key: str, value: int, message: str
) -> None:
    setattr(ours.config.attention, key, value)
    with pytest.raises(ValueError, match=message):
        check_model(ours.config)


def test_a_model_without_experts_must_be_dense_throughout(ours: Transformer) -> None:
    ours.config.num_dense_layers = 1
    with pytest.raises(ValueError, match=r"model.moe=null, but only model.num_dense_layers=1"):
        check_model(ours.config)
