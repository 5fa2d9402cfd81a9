"""Forced balance in the bench is exact, for ours and for the peer."""

import pytest
import torch

from bench.balanced import choose_in_turn, force_balance
from bench.moe import our_layer, their_layer
from bench.sizes import layer_cases


@pytest.mark.slow
def test_forced_balance_gives_every_expert_equally_many_rows() -> None:
    cpu = torch.device("cpu")
    case = layer_cases(cpu)[0]._replace(batch_size=1, seq_len=32)
    x = torch.randn(1, 32, case.config.dim)
    ours, theirs = our_layer(case, cpu), their_layer(case, cpu)
    assert (ours(x, torch.ones(1, 32, dtype=torch.bool)).load != 3).any()
    for layer in (ours, theirs):
        force_balance(layer)
    assert (ours(x, torch.ones(1, 32, dtype=torch.bool)).load == 3).all()
    assert (theirs.gate(x)[2].flatten().bincount() == 3).all()
    ids = choose_in_turn(32, num_experts=64, top_k=6)
    assert all(len(set(row)) == 6 for row in ids.tolist())
