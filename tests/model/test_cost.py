"""Counts against the model itself; tests/test_presets.py compares with what was published."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.cost import (
    count_parameters,
    flops_by_component,
    flops_per_token,
    parameters_by_component,
)
from tests.model.small import packed_batch, small_config, small_model


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


def test_components_are_what_their_names_say() -> None:
    config = small_config(mtp_depth=1)
    shares = parameters_by_component(config)
    expert = 3 * 16 * 6
    assert shares["embedding"] == (48 * 16, 0)
    assert shares["head"] == (48 * 16, 48 * 16)
    assert shares["router"] == (8 * 16, 8 * 16)
    assert shares["routed experts"] == (8 * expert, 3 * expert)
    assert shares["shared experts"] == (expert, expert)
    assert shares["dense feed-forward"] == (3 * 16 * 24, 3 * 16 * 24)
    assert shares["norms"].total == 16 + 2 * (2 * 16 + 10 + 8)
    attention = 16 * 10 + 10 * 2 * 10 + 16 * 12 + 8 * 2 * 11 + 2 * 5 * 16
    assert shares["attention"].total == 2 * attention
    flops = flops_by_component(config, seq_len=7)
    assert flops["attention"] == 2 * 6 * (attention + 2 * (10 + 5) * 4)
    assert flops["routed experts"] == 6 * 3 * expert
    assert flops["norms"] == flops["embedding"] == 0


def test_a_tied_embedding_is_active_as_the_head() -> None:
    config = small_config()
    untied, untied_flops = count_parameters(config), flops_by_component(config, seq_len=8)
    config.tie_embedding = True
    tied = count_parameters(config)
    assert tied.total == untied.total - 48 * 16
    assert tied.active == untied.active
    assert flops_by_component(config, seq_len=8) == untied_flops


def _flops_of_adding_a_product(
    _: torch.Size, left: torch.Size, right: torch.Size, *, out_shape: torch.Size
) -> int:
    """torch's counter knows the out-of-place form only; these are its arguments' shapes."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("mtp_depth", [0, 2])
@pytest.mark.parametrize("q_lora_rank", [None, 10])
def test_flops_equal_those_of_a_real_step(mtp_depth: int, q_lora_rank: int | None) -> None:
    config = small_config(mtp_depth=mtp_depth)
    config.attention.q_lora_rank = q_lora_rank
    rows, seq_len = 3, 8
    batch = packed_batch([[seq_len]] * rows)
    in_place = {torch.ops.aten.addmm_: _flops_of_adding_a_product}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        sums = small_model(config)(*batch, segments=[seq_len] * rows)
        (sums.loss + sums.mtp_loss.sum()).backward()
    counts = counter.get_flop_counts()["Global"]
    products = counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm_]

    tokens_seen = sum(range(1, seq_len + 1))  # by the tokens of one row
    width = 2 * (6 + 4 + 5)  # heads * (nope + rope + value widths)
    layers = config.num_layers + mtp_depth
    attention = 3 * 2 * width * tokens_seen * rows * layers
    per_token = flops_per_token(config, seq_len=seq_len)
    assert per_token * rows * seq_len == products + attention
