"""The whole model against transformers' DeepSeek-V2 and V3, weights copied."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from model.cache import Cache
from model.config import check_model
from model.transformer import Transformer
from tests.model.deepseek import our_config, translate

TOLERANCE = 1e-5  # of a tensor's largest entry
BATCH, SEQ_LEN = 2, 40

NO_SCALING = {"rope_type": "default", "rope_theta": 1e4}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
YARN_UNEVEN = YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 8.0}


def _sizes(seed: str) -> dict[str, Any]:
    """Random sizes of a small model."""
    draw = random.Random(seed)
    num_heads = draw.choice([1, 2, 3])
    return {
        "vocab_size": draw.randint(50, 150),
        "hidden_size": num_heads * draw.randint(10, 20),
        "intermediate_size": draw.randint(20, 60),
        "moe_intermediate_size": draw.randint(8, 24),
        "num_hidden_layers": 3,
        "num_attention_heads": num_heads,
        "kv_lora_rank": 2 * draw.randint(4, 10),
        "qk_nope_head_dim": 2 * draw.randint(4, 8),
        "qk_rope_head_dim": 2 * draw.randint(2, 5),
        "v_head_dim": draw.randint(5, 12),
        "first_k_dense_replace": draw.choice([0, 1, 2]),
        "n_shared_experts": draw.choice([1, 2]),
        "n_routed_experts": 8,
        "num_experts_per_tok": draw.choice([2, 3]),
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "use_cache": False,
    }


@pytest.mark.parametrize("rope", [NO_SCALING, YARN, YARN_UNEVEN], ids=["rope", "yarn", "uneven"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)], ids=["ungrouped", "grouped"])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_v3_logits_and_gradients_equal_transformers(
    q_lora_rank: int | None, groups: tuple[int, int], rope: dict[str, Any]
) -> None:
    config = DeepseekV3Config(
        **_sizes(seed=f"{q_lora_rank} {groups} {rope}"),
        q_lora_rank=q_lora_rank,
        n_group=groups[0],
        topk_group=groups[1],
        norm_topk_prob=groups == (4, 2),
        rope_parameters=dict(rope),
    )
    _assert_parity(DeepseekV3ForCausalLM, config)


@pytest.mark.parametrize("rope", [NO_SCALING, YARN, YARN_UNEVEN], ids=["rope", "yarn", "uneven"])
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_v2_logits_and_gradients_equal_transformers(
    q_lora_rank: int | None, method: str, rope: dict[str, Any]
) -> None:
    config = DeepseekV2Config(
        **_sizes(seed=f"{q_lora_rank} {method} {rope}"),
        q_lora_rank=q_lora_rank,
        topk_method=method,
        n_group=4,
        topk_group=2,
        rope_parameters=dict(rope),
    )
    _assert_parity(DeepseekV2ForCausalLM, config)


def test_decoding_from_the_latent_cache_equals_transformers() -> None:
    config = DeepseekV3Config(
        **_sizes(seed="decode"), q_lora_rank=12, n_group=4, topk_group=2, rope_parameters=dict(YARN)
    )
    theirs, ours, tokens = _pair(DeepseekV3ForCausalLM, config)
    caches = [Cache(capacity=SEQ_LEN) for _ in ours.layers]
    with torch.no_grad():
        wanted = theirs(tokens).logits
        ours.decode(tokens[:, :30], caches)  # a prompt, one token, several tokens
        for new in (tokens[:, 30:31], tokens[:, 31:]):
            states = ours.decode(new, caches)
            _assert_close(
                ours.predict(states),
                wanted[:, caches[0].length - new.shape[1] :][:, : new.shape[1]],
            )


def _assert_parity(model_class: Any, config: Any) -> None:
    theirs, ours, tokens = _pair(model_class, config)
    targets = torch.randint(config.vocab_size, tokens.shape)
    positions = torch.arange(SEQ_LEN).expand_as(tokens)
    counted = torch.ones_like(tokens, dtype=torch.bool)

    logits = theirs(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    with torch.no_grad():
        _assert_close(ours.logits(tokens), logits)
    sums = ours(tokens, targets, positions, counted, segments=[SEQ_LEN] * BATCH)
    sums.loss.backward()
    _assert_close(sums.loss, loss)
    assert sums.load.sum() == tokens.numel() * config.num_experts_per_tok * len(sums.load)

    theirs_by_name = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in theirs.named_parameters()
    }
    wanted = translate(theirs_by_name)
    assert wanted.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        _assert_close(parameter.grad, wanted[name], name)


def _pair(model_class: Any, config: Any) -> tuple[Any, Transformer, Tensor]:
    """Their model with random weights (biases and norms too), ours with the same, and tokens."""
    torch.manual_seed(0)
    theirs = model_class._from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if "norm" in name or "bias" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    check_model(our_config(config))
    ours = Transformer(our_config(config))
    missing, unexpected = ours.load_state_dict(translate(theirs.state_dict()), strict=False)
    assert not unexpected
    assert all(name.endswith("router.bias") for name in missing)  # V2 has none
    return theirs, ours, torch.randint(config.vocab_size, (BATCH, SEQ_LEN))


def _assert_close(actual: Tensor, wanted: Tensor, name: str = "") -> None:
    largest = wanted.abs().max().clamp(min=1e-20)
    difference = ((actual - wanted).abs().max() / largest).item()
    assert difference <= TOLERANCE, f"{name} differs by {difference:.1e} of its largest entry"
