"""Counts against what was published and against the model itself."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV3ForCausalLM

from model.cost import count_parameters, flops_per_token
from tests.model.deepseek import our_config
from tests.model.small import packed_batch, small_config, small_model

V3 = DeepseekV3Config()  # the published sizes are transformers' defaults
V2 = DeepseekV2Config(
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    num_attention_heads=128,
    n_routed_experts=160,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
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
)


@pytest.mark.parametrize(
    ("theirs", "total", "active"),
    [(V3, 671e9, 37e9), (V2, 236e9, 21e9), (V2_LITE, 15.7e9, 2.4e9)],
    ids=["V3", "V2", "V2-Lite"],
)
def test_counts_come_to_the_published_ones(
    theirs: DeepseekV2Config | DeepseekV3Config, total: float, active: float
) -> None:
    counted = count_parameters(our_config(theirs))
    assert counted.total == pytest.approx(total, rel=2e-3)
    assert counted.active == pytest.approx(active, rel=25e-3)


def test_v3_counts_to_the_last_parameter() -> None:
    config = our_config(V3)
    counted = count_parameters(config)
    with torch.device("meta"):
        theirs = DeepseekV3ForCausalLM(V3)
    assert counted.total == sum(parameter.numel() for parameter in theirs.parameters())
    routing_biases = (config.num_layers - config.num_dense_layers) * config.moe.num_experts
    assert counted.total + routing_biases == 671_026_419_200  # as published


@pytest.mark.parametrize("mtp_depth", [0, 1, 2])
def test_counts_equal_the_built_models(mtp_depth: int) -> None:
    config = small_config(mtp_depth=mtp_depth)
    model = small_model(config)
    counted = count_parameters(config)
    parameters = dict(model.named_parameters())
    mtp = sum(p.numel() for name, p in parameters.items() if name.startswith("mtp."))
    assert counted.mtp == mtp
    assert counted.total + mtp == sum(p.numel() for p in parameters.values())
    assert counted.embedding == 48 * 16
    idle_experts = 8 - 3
    assert counted.total - counted.active == counted.embedding + idle_experts * 3 * 16 * 6


@pytest.mark.parametrize("mtp_depth", [0, 2])
@pytest.mark.parametrize("q_lora_rank", [None, 10])
def test_flops_equal_those_of_a_real_step(mtp_depth: int, q_lora_rank: int | None) -> None:
    config = small_config(mtp_depth=mtp_depth)
    config.attention.q_lora_rank = q_lora_rank
    rows, seq_len = 3, 8
    batch = packed_batch([[seq_len]] * rows)
    with FlopCounterMode(display=False) as counter:
        sums = small_model(config)(*batch, segments=[seq_len] * rows)
        (sums.loss + sums.mtp_loss.sum()).backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    tokens_seen = sum(range(1, seq_len + 1))  # by the tokens of one row
    width = 2 * (6 + 4 + 5)  # heads * (nope + rope + value widths)
    layers = config.num_layers + mtp_depth
    attention = 3 * 2 * width * tokens_seen * rows * layers
    per_token = flops_per_token(config, seq_len=seq_len)
    assert per_token * rows * seq_len == products + attention
