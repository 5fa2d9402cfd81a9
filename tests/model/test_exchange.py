"""Rows travel while the shared experts and the balance loss are computed, and no bit changes."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import model.moe
from model.dispatch import combine, invert, permute, swap_runs
from model.exchange import IN_FP8, PLAIN, Flight, Wire
from model.init import initialise
from model.moe import MoE, MoEConfig
from model.products import use_fp8
from model.router import RouterConfig
from model.whereabouts import HERE
from tests.ranks import ranks

DIM = 20
CONFIG = MoEConfig(
    num_experts=8, top_k=3, expert_dim=12, num_shared_experts=2, router=RouterConfig()
)


class Waiting(torch.autograd.Function):
    """An exchange that nothing is computed beside."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], there: Wire, back: Wire
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.back = sent, received, back
        return exchange(rows, sent, received, there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return exchange(grad, ctx.received, ctx.sent, ctx.back), None, None, None, None


def exchange(rows: Tensor, sent: list[int], received: list[int], wire: Wire) -> Tensor:
    message = wire.write(rows)
    arrived = message.new_empty(sum(received), message.shape[1])
    dist.all_to_all_single(arrived, message, received, sent)
    return wire.read(arrived, width=rows.shape[1], dtype=rows.dtype)


def in_turn(moe: MoE, x: Tensor) -> Tensor:
    """The layer's result, one thing after the other."""
    tokens = x.flatten(0, 1)
    routing = moe.router(tokens)
    plan = moe.dispatcher.plan(routing.expert_ids)
    (chunk,) = plan.chunks
    wire = IN_FP8 if moe.experts.is_fp8 else PLAIN
    rows = permute(tokens, plan.order, top_k=CONFIG.top_k)
    arrived = Waiting.apply(rows, chunk.sent, chunk.received, wire, PLAIN)
    places = swap_runs(chunk.runs, total=sum(chunk.received))
    outputs = moe.experts(arrived[places], chunk.counts)[invert(places)]
    returned = Waiting.apply(outputs, chunk.received, chunk.sent, PLAIN, wire)
    return combine(returned, routing.weights, plan.order).view_as(x) + moe.shared(x)


def make_layer(precision: str) -> MoE:
    moe = MoE(CONFIG, dim=DIM, expert_group=dist.group.WORLD)
    initialise(moe, seed=3, std=0.3)
    moe.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    if precision == "fp8":
        use_fp8(moe)
    return moe


def overlapping(moe: MoE, x: Tensor) -> Tensor:
    return moe(x, torch.ones(x.shape[:2], dtype=torch.bool)).hidden


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@ranks(2)
def test_overlap_changes_no_bit_of_results_and_gradients(precision: str) -> None:
    results = []
    for layer in (in_turn, overlapping):
        moe = make_layer(precision)
        torch.manual_seed(dist.get_rank())
        x = torch.randn(2, 9 + dist.get_rank(), DIM, dtype=moe.experts.gate.dtype)
        inner = x.requires_grad_() * 1.5  # not a leaf: contributions are added up on the way
        hidden = layer(moe, inner)
        hidden.backward(torch.randn_like(hidden))
        results.append([hidden, x.grad, *(parameter.grad for parameter in moe.parameters())])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


# What happens on every rank, in this order.
EVENTS = [
    "dispatch departs",
    "shared experts",
    "dispatch arrives",
    "experts",
    "combine departs",
    "balance loss",
    "combine arrives",
    "combine, backward departs",
    "balance loss, backward",
    "combine, backward arrives",
    "experts, backward",
    "dispatch, backward departs",
    "shared experts, backward",
    "dispatch, backward arrives",
]


class Trace:
    """Notes what happens; `told` is called with each event."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self.events: list[str] = []
        self._told = told

    def note(self, event: str) -> None:
        waits = HERE.innermost()
        assert (waits is not None) == event.endswith("arrives"), "who computes is not waiting"
        self.events.append(event)
        self._told(event)

    def depart(self, before: Callable[[str], None]) -> Callable[..., None]:
        """`Flight.__init__`, whose all-to-all begins after `before`."""
        begin = Flight.__init__

        def noted(flight: Flight, rows: Tensor, route: Any, wire: Wire) -> None:
            before(f"{route.name} departs")
            begin(flight, rows, route, wire)
            self.note(f"{route.name} departs")
            wait = flight._work.wait

            def noted_wait() -> None:
                here = HERE.innermost()
                assert here is not None
                assert here.detail == {"sent": route.sent, "received": route.received}
                wait()
                self.note(f"{here.name} arrives")

            flight._work = type("Work", (), {"wait": staticmethod(noted_wait)})

        return noted

    def watch(self, module: nn.Module, name: str, last: nn.Parameter) -> None:
        """`last` is the parameter whose gradient is made last."""
        module.register_forward_hook(lambda *_: self.note(name))
        last.register_post_accumulate_grad_hook(lambda _: self.note(f"{name}, backward"))


@ranks(2, seconds=60)
def test_rows_are_under_way_while_the_shared_experts_are_computed() -> None:
    """Rank 1 lets no message depart before rank 0 has computed what stands beside it: a rank 0 that
    waited for the message first would wait for ever."""
    store = dist.distributed_c10d._get_default_store()
    is_first = dist.get_rank() == 0
    computed = {one: EVENTS[i + 1] for i, one in enumerate(EVENTS) if one.endswith("departs")}
    trace = Trace(lambda event: store.set(event, "") if is_first else None)
    moe = make_layer("fp32")
    assert moe.shared is not None
    trace.watch(moe.shared, "shared experts", moe.shared.gate.weight)
    trace.watch(moe.experts, "experts", moe.experts.gate)
    balance_loss = model.moe.sequence_balance_loss

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = balance_loss(*args, **kwargs)
        trace.note("balance loss")
        loss.register_hook(lambda _: trace.note("balance loss, backward"))
        return loss

    def before(event: str) -> None:
        if not is_first:
            store.wait([computed[event]])

    x = torch.randn(1, 9, DIM, requires_grad=True)
    with (
        patch.object(Flight, "__init__", trace.depart(before)),
        patch.object(model.moe, "sequence_balance_loss", noted),
    ):
        out = moe(x, torch.ones(1, 9, dtype=torch.bool))
        (out.hidden.sum() + out.balance_loss).backward()
    assert trace.events == EVENTS
