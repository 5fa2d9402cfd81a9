"""Two halves of a micro-batch in turns: nothing but the order in which things are computed changes,
and the rows of one half travel while the other is computed, forward and backward."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.block import Block, BlockOutput
from model.exchange import Flight
from model.halves import in_turns
from model.init import initialise
from model.moe import MoE
from model.products import use_fp8
from model.rope import rotation
from model.sequences import WholeSequences
from tests.model.small import small_config
from tests.ranks import ranks

SEQ_LEN = 9
DOCUMENTS = [[4, 5], [9], [9], [2, 7]]  # of each sequence


def make_block(*, in_halves: bool, precision: str = "fp32") -> Block:
    block = Block(
        small_config(),
        is_dense=False,
        expert_group=dist.group.WORLD,
        sequences=WholeSequences(),
        in_halves=in_halves,
    )
    initialise(block, seed=1, std=0.4)
    block.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    if precision == "fp8":
        use_fp8(block)
    return block


def run(block: Block, x: Tensor, sequences: range) -> BlockOutput:
    own = slice(sequences.start, sequences.stop)
    positions = torch.arange(SEQ_LEN).expand(len(sequences), SEQ_LEN)
    counted = torch.ones(len(DOCUMENTS), SEQ_LEN, dtype=torch.bool)
    counted[0, 4] = counted[-1, 6:] = False
    segments = [length for i in sequences for length in DOCUMENTS[i]]
    turn = rotation(small_config().rope, positions, dim=4)
    output: BlockOutput = block(x[own], turn, counted[own], segments=segments)
    return output


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@ranks(2)
def test_halves_are_two_micro_batches_bit_for_bit(precision: str) -> None:
    """Results, counts and gradients; the weights' gradients as accumulation adds them up."""
    results = []
    for splits in ([range(4)], [range(2, 4), range(2)]):  # autograd takes the second half first
        block = make_block(in_halves=len(splits) == 1, precision=precision)
        torch.manual_seed(dist.get_rank())
        x = torch.randn(4, SEQ_LEN, 16, dtype=block.attention_norm.weight.dtype).requires_grad_()
        wanted = torch.randn_like(x)
        hidden, load = torch.zeros_like(x), torch.zeros(8, dtype=torch.int64)
        for sequences in splits:
            out = run(block, x, sequences)
            own = slice(sequences.start, sequences.stop)
            loss = (out.hidden * wanted[own]).sum(dtype=torch.float32) + out.balance_loss
            loss.backward()
            hidden[own], load = out.hidden.detach(), load + out.load
        gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
        results.append({"hidden": hidden, "load": load, "x": x.grad, **gradients})
    for name, got in results[0].items():
        assert torch.equal(got, results[1][name]), name


# What happens on every rank, in this order; beside each departure what must not wait for it.
EVENTS = [
    "attention 1",
    "dispatch 1 departs",
    "attention 2",
    "dispatch 2 departs",
    "dispatch 1 arrives",
    "experts 1",
    "combine 1 departs",
    "dispatch 2 arrives",
    "experts 2",
    "combine 2 departs",
    "shared experts 1",
    "combine 1 arrives",
    "shared experts 2",
    "combine 2 arrives",
    "combine, backward 2 departs",
    "shared experts 2, backward",
    "combine, backward 1 departs",
    "shared experts 1, backward",
    "combine, backward 2 arrives",
    "experts 2, backward",
    "dispatch, backward 2 departs",
    "combine, backward 1 arrives",
    "experts 1, backward",
    "dispatch, backward 1 departs",
    "dispatch, backward 2 arrives",
    "attention 2, backward",
    "dispatch, backward 1 arrives",
    "attention 1, backward",
]
BESIDE = {
    "dispatch 1 departs": "attention 2",
    "dispatch 2 departs": "experts 1",
    "combine 1 departs": "experts 2",
    "combine 2 departs": "shared experts 1",
    "combine, backward 2 departs": "shared experts 2, backward",
    "combine, backward 1 departs": "experts 2, backward",
    "dispatch, backward 2 departs": "experts 1, backward",
    "dispatch, backward 1 departs": "attention 2, backward",
}


class Trace:
    """Notes what happens on this rank, and tells rank 1 what rank 0 has done."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._store = dist.distributed_c10d._get_default_store()
        self._passes: dict[str, int] = {}
        self._is_first = dist.get_rank() == 0

    def note(self, event: str) -> None:
        self.events.append(event)
        if self._is_first:
            self._store.set(event, "")

    def hold_back(self, event: str) -> None:
        """On rank 1: until rank 0 has computed what stands beside the departure."""
        if not self._is_first:
            self._store.wait([BESIDE[event]])

    def next_half(self, name: str) -> int:
        """1 and 2, in the order in which a name is met; backward the second half comes first."""
        seen = self._passes[name] = self._passes.get(name, 0) + 1
        return 3 - seen if name.endswith("backward") else seen

    def watch(self, module: torch.nn.Module, name: str) -> None:
        """Its forward pass when it is done, its backward pass when the gradient of its input is."""

        def with_hook(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            half = self.next_half(name)
            own = inputs[0].view_as(inputs[0])  # whose gradient is the module's alone
            own.register_hook(lambda _: self.note(f"{name} {half}, backward"))
            return own, *inputs[1:]

        module.register_forward_pre_hook(with_hook)
        module.register_forward_hook(lambda *_: self.note(f"{name} {self._passes[name]}"))

    def of_flights(self) -> Any:
        begin, trace = Flight.__init__, self

        def noted(flight: Flight, rows: Tensor, route: Any, wire: Any) -> None:
            name = f"{route.name} {trace.next_half(route.name)}"
            trace.hold_back(f"{name} departs")
            begin(flight, rows, route, wire)
            trace.note(f"{name} departs")
            wait = flight._work.wait

            def noted_wait() -> None:
                wait()
                trace.note(f"{name} arrives")

            flight._work = type("Work", (), {"wait": staticmethod(noted_wait)})

        return patch.object(Flight, "__init__", noted)


@ranks(2, seconds=30)
def test_one_half_is_computed_while_the_others_rows_travel() -> None:
    """Rank 1 lets no message depart before rank 0 has computed what stands beside it: a rank 0 that
    waited for the message first would wait for ever."""
    block = make_block(in_halves=True)
    assert isinstance(block.ffn, MoE)
    assert block.ffn.shared is not None
    trace = Trace()
    trace.watch(block.attention, "attention")
    trace.watch(block.ffn.experts, "experts")
    trace.watch(block.ffn.shared, "shared experts")
    x = torch.randn(4, SEQ_LEN, 16, requires_grad=True)
    with trace.of_flights():
        run(block, x, range(4)).hidden.sum().backward()
    assert trace.events == EVENTS


def test_runs_of_different_lengths_take_no_turns() -> None:
    def steps(count: int) -> Any:
        for _ in range(count):
            yield
        return count

    assert in_turns(steps(2), steps(2)) == [2, 2]
    with pytest.raises(AssertionError, match="equally many steps"):
        in_turns(steps(1), steps(2))
