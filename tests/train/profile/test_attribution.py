"""Whose time is whose, by a clock that only the parts' own work moves."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from model.init import initialise
from model.recompute import Recompute
from model.transformer import Transformer
from tests.train.tiny import random_batches, tiny_model
from train.profile.attribution import attributed
from train.profile.parts import Part, regions
from train.profile.stopwatch import START, Label, Phase, Stopwatch

FORWARD, BACKWARD = 1, 1000

# Twice for each call, at the part's first operation and at its last, where these have a gradient.
# One dense layer, two with experts, one depth of MTP.
ROUTER = 2 + 1  # and the balance loss
DISPATCH = 2 + 1 + 1 + 2 + 2  # permute, send, arrive, send back, combine


def calls_with(runs: int) -> dict[Part, int]:
    """`runs` through each block with experts: one, or one for each half."""
    in_block = 2 * (4 + 1) + ROUTER + DISPATCH + 2 * 2
    return {
        Part.embedding: 1,
        Part.norms: 2 * (4 + 2 * 4 * runs + 1),
        Part.attention: 2 * (1 + 2 * runs),
        Part.dense: 2,
        Part.router: ROUTER * 2 * runs,
        Part.dispatch: DISPATCH * 2 * runs,
        Part.experts: 2 * 2 * runs,
        Part.shared: 2 * 2 * runs,
        Part.mtp: 2 * (1 + 3) + in_block * runs,  # itself, and all of these in it
        Part.head: 2 * 2,
    }


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def slow(self, function: Any) -> Any:
        """The function; it now takes time when it begins and when it ends, forward and backward."""

        def slow(*args: Any, **kwargs: Any) -> Any:
            outputs = function(*self._work(args), **kwargs)
            if isinstance(outputs, Tensor):
                return self._work((outputs,))[0]
            return outputs._replace(**dict(zip(outputs._fields, self._work(outputs), strict=True)))

        return slow

    def _work(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values, the first tensor with a gradient passed through work."""
        for i, value in enumerate(values):
            if isinstance(value, Tensor) and value.requires_grad:
                return *values[:i], _Work.apply(value, self), *values[i + 1 :]
        return values


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock) -> Tensor:
        ctx.clock = clock
        clock.now += FORWARD
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.clock.now += BACKWARD
        return grad, None


class Counted(Stopwatch):
    def __init__(self, clock: Clock) -> None:
        super().__init__(torch.device("cpu"))
        self._clock = clock

    def _now(self) -> int:
        return self._clock.now


@contextmanager
def slow_parts(transformer: Transformer, clock: Clock) -> Iterator[None]:
    patches = [
        mock.patch.object(owner, name, clock.slow(getattr(owner, name)))
        for owner, name, _ in regions(transformer)
    ]
    for patch in patches:
        patch.start()
    yield
    for patch in patches:
        patch.stop()


@pytest.mark.parametrize("in_halves", [False, True])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_a_parts_work_is_its_own_forward_and_backward(
    recompute: Recompute, in_halves: bool
) -> None:
    config = tiny_model()
    transformer = Transformer(config, recompute=recompute, in_halves=in_halves)
    initialise(transformer, seed=0, std=0.05)
    clock = Clock()
    stopwatch = Counted(clock)
    engine: Any = SimpleNamespace(
        model=transformer, step=lambda: None, backward=lambda loss: loss.backward()
    )
    (batch,) = random_batches(0, rank=0, num_ranks=1, micro_batch_size=8)
    batches: Any = SimpleNamespace(take=lambda: batch)
    with slow_parts(transformer, clock), attributed(engine, batches, stopwatch):
        stopwatch.start()
        *tensors, segments = batches.take()
        sums = transformer(*tensors, segments=segments)
        engine.backward(sums.loss + sums.mtp_loss.sum() + sums.balance_loss)
        engine.step()
        seconds = stopwatch.stop()

    assert set(seconds) >= {START, Label(Part.gradients, Phase.backward)}
    wanted = calls_with(runs=2 if in_halves else 1)
    for part, calls in wanted.items():
        assert seconds[Label(part, Phase.forward)] == calls * FORWARD, part
        backward, again = divmod(seconds[Label(part, Phase.backward)], BACKWARD)
        assert backward == calls, part
        assert (again > 0) <= (recompute is not Recompute.none), part
    known = {*wanted, Part.data, Part.gradients, Part.optimizer, Part.other, Part.profiler}
    assert set(Part) == known
    assert sum(seconds.values()) == clock.now
    assert all(seconds[label] == 0 for label in seconds if label.part not in wanted)


def test_what_followed_a_step_leaves_no_trace() -> None:
    transformer = Transformer(tiny_model())
    before = {id(owner): dict(vars(owner)) for owner, *_ in regions(transformer)}
    engine: Any = SimpleNamespace(model=transformer, step=None, backward=None)
    with attributed(engine, SimpleNamespace(take=None), Counted(Clock())):  # type: ignore[arg-type]
        assert any(vars(owner) != before[id(owner)] for owner, *_ in regions(transformer))
    assert all(vars(owner) == before[id(owner)] for owner, *_ in regions(transformer))
