"""What bench.step_products records is what was multiplied."""

import torch
import torch.nn.functional as F
from torch import nn

from bench.step_products import Recorder, flops, least_seconds


def test_recorded_products_have_the_flops_of_a_layers_pass() -> None:
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    with Recorder() as recorder:
        layer(x).sum().backward()
    assert sum(count * flops(call) for call, count in recorder.calls.items()) == 6 * 16 * 8 * 4


def test_recorded_attention_and_products_run_again_alone() -> None:
    heads = torch.randn(1, 2, 4, 8, requires_grad=True)
    total = torch.zeros(4, 4)
    with Recorder() as recorder:
        F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
        total.addmm_(torch.ones(4, 2), torch.ones(2, 4))
        torch.mm(torch.ones(4, 2), torch.ones(2, 4), out=total)
    assert sorted(call.kind for call in recorder.calls) == [*["attention"] * 2, *["products"] * 2]
    assert all(least_seconds(call) > 0 for call in recorder.calls)
