"""`python -m bench.moe`: an MoE layer, forward and backward, against transformers' DeepseekV3MoE.

V2-Lite's and V3's layer in BF16 on a GPU, narrower ones in fp32 on the CPU; the routing as it falls
at random weights, and forced balance, for both. Then dispatch and combine alone (one rank: sorting
the choices, rows to their experts' places, weighted sums back), beside the same by plain indexing.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from bench.balanced import choose_in_turn, force_balance
from bench.floors import cases_and_floors, describe, name
from bench.peer import fill, peer_config
from bench.rows import Row, note
from bench.sizes import Case
from bench.timing import median_seconds, prepare
from model.dispatch import Dispatcher, combine, permute
from model.moe import MoE
from train.profile.report import Floors
from train.profile.work import Work

ROUNDS = 7


def main() -> None:
    device = prepare()
    for case, floors in cases_and_floors(device):
        print(f"{case.name}: {case.tokens} tokens of width {case.config.dim}, {name(case.dtype)}")
        time_layers(case, device, floors)
        time_dispatch(case, device, floors)


def time_layers(case: Case, device: torch.device, floors: Floors) -> None:
    x = torch.randn(case.batch_size, case.seq_len, case.config.dim, device=device)
    x = x.to(case.dtype).requires_grad_()
    work = Work(flops=layer_flops(case))
    for routing in ("natural", "balanced"):
        layers = {"ours": our_layer(case, device), "transformers": their_layer(case, device)}
        if routing == "balanced":
            for layer in layers.values():
                force_balance(layer)
        ours, theirs = layers.values()
        counted = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
        passes = {
            "ours": partial(run, lambda m=ours, c=counted: m(x, c).hidden, ours, x),
            "transformers": partial(run, lambda m=theirs: m(x), theirs, x),
        }
        report(case, f"MoE layer, {routing}", median_seconds(passes, rounds=ROUNDS), work, floors)


def layer_flops(case: Case) -> float:
    """Products of router, experts and shared experts, forward and twice backward."""
    moe, dim = case.config.moe, case.config.dim
    assert moe is not None
    networks = (moe.top_k + moe.num_shared_experts) * 3 * dim * moe.expert_dim
    return 6 * case.tokens * (networks + dim * moe.num_experts)


def our_layer(case: Case, device: torch.device) -> nn.Module:
    assert case.config.moe is not None
    with device:
        layer = MoE(case.config.moe, dim=case.config.dim).to(case.dtype)
    fill(layer, 0.02)
    return layer


def their_layer(case: Case, device: torch.device) -> nn.Module:
    config = peer_config(case.config, seq_len=case.seq_len, experts="grouped_mm")
    with device:
        layer: nn.Module = DeepseekV3MoE(config).to(case.dtype)
    fill(layer, 0.02)
    return layer


def time_dispatch(case: Case, device: torch.device, floors: Floors) -> None:
    """Least bytes: tokens, rows, results and sums, and their gradients, as the profiler counts."""
    moe = case.config.moe
    assert moe is not None
    top_k = moe.top_k
    dispatcher = Dispatcher(num_experts=moe.num_experts)
    ids = choose_in_turn(case.tokens, num_experts=moe.num_experts, top_k=top_k).to(device)
    x = torch.randn(case.tokens, case.config.dim, device=device).to(case.dtype).requires_grad_()
    weights = torch.rand(case.tokens, top_k, device=device).to(case.dtype).requires_grad_()

    def ours() -> Tensor:
        order = dispatcher.plan(ids).order
        return combine(permute(x, order, top_k=top_k), weights, order)

    def by_index() -> Tensor:
        order = ids.flatten().argsort(stable=True)
        rows = x[order // top_k] * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // top_k, rows)

    passes = {
        label: partial(run, function, None, x, weights)
        for label, function in (("ours", ours), ("by index", by_index))
    }
    work = Work(bytes=x.numel() * x.itemsize * (4 + 5 * top_k))
    report(case, "dispatch and combine", median_seconds(passes, rounds=ROUNDS), work, floors)


def run(forward: Callable[[], Tensor], layer: nn.Module | None, *inputs: Tensor) -> None:
    """Forward and backward, into all weights."""
    output = forward()
    of = [*inputs, *(layer.parameters() if layer is not None else ())]
    torch.autograd.grad(output, of, torch.ones_like(output), allow_unused=True)


def report(case: Case, title: str, medians: dict[str, float], work: Work, floors: Floors) -> None:
    for label, seconds in medians.items():
        what = f"{title}, forward and backward, {case.name}: {label}"
        note(
            Row(
                what,
                describe(seconds, work, floors),
                "",
                f"{seconds / medians['ours']:.2f} of ours",
            )
        )


if __name__ == "__main__":
    main()
