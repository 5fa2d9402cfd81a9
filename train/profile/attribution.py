"""Whose time it is: while this is entered, the step's code switches a stopwatch from part to part.

Forward, a part's functions are wrapped. Backward, autograd runs the nodes that they left in the
graph: each is told its part after the forward pass, and switches the stopwatch before it runs.
What adds gradients up, and the reduction that an engine hangs on it, are nodes of their own.
"""

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import Node

from data.batches import Batches
from train.engine.engine import Engine
from train.profile.parts import Part, regions
from train.profile.stopwatch import Label, Phase, Stopwatch


@contextmanager
def attributed(engine: Engine, batches: Batches, stopwatch: Stopwatch) -> Iterator[None]:
    """While entered, `stopwatch` follows the engine's steps and the reading of batches."""
    attribution = _Attribution(stopwatch)
    around = (
        (batches, "take", Part.data, Phase.around),
        (engine, "step", Part.optimizer, Phase.around),
        (engine, "backward", Part.other, Phase.backward),
    )
    with ExitStack() as stack:
        for owner, name, part, phase in around:
            timed = stopwatch.timing(getattr(owner, name), part, phase)
            stack.enter_context(_replaced(owner, name, timed))
        for owner, name, part in regions(engine.model):
            timed = attribution.of_region(getattr(owner, name), part)
            stack.enter_context(_replaced(owner, name, timed))
        advance = attribution.of_pass(engine.model.advance)
        stack.enter_context(_replaced(engine.model, "advance", advance))
        stack.callback(attribution.forget)
        yield


class _Attribution:
    """Autograd numbers its nodes as they are made, so their numbers tell whose they are."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._firsts: list[int] = []  # numbers at which a part began in this forward pass
        self._parts: list[Part] = []  # and which
        self._sums: dict[int, Node] = {}  # of each parameter; held: a dead node's hook is gone
        self._handles: list[Any] = []

    def of_region(self, function: Callable[..., Any], part: Part) -> Callable[..., Any]:
        """The function; its time is the part's, and so are its nodes'."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer = self._stopwatch.label
            with self._stopwatch.within(part) as label:
                self._note(label)
                try:
                    return function(*args, **kwargs)
                finally:
                    self._note(outer)

        return timed

    def of_pass(self, advance: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward pass; the nodes that it has made know their parts."""

        @functools.wraps(advance)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._firsts.clear()
            self._parts.clear()
            with self._stopwatch.within(Part.other, Phase.forward) as label:
                self._note(label)
                outputs = advance(*args, **kwargs)
                with self._stopwatch.within(Part.profiler, Phase.forward):
                    self._tell(outputs)
            return outputs

        return timed

    def forget(self) -> None:
        """Take the hooks off nodes that outlive a step: those of parameters."""
        for handle in self._handles:
            handle.remove()
        self._sums.clear()

    def _note(self, label: Label) -> None:
        """From here on nodes are this label's. What backward computes again makes none that run."""
        if label.phase is Phase.forward:
            self._firsts.append(_get_sequence_nr())
            self._parts.append(label.part)

    def _tell(self, outputs: Any) -> None:
        """Tell the nodes of this forward pass behind `outputs` whose they are."""
        switches = {part: self._switching_to(part) for part in Part}
        told: set[int] = set()
        found = [tensor.grad_fn for tensor in _tensors(outputs)]
        while found:
            node = found.pop()
            if node is None:
                continue
            if hasattr(node, "variable"):
                self._tell_sum(node, switches[Part.gradients])
                continue
            number = node._sequence_nr()
            if number < self._firsts[0] or number in told:
                continue
            told.add(number)
            found += [following for following, _ in node.next_functions]
            part = self._parts[bisect_right(self._firsts, number) - 1]
            node.register_prehook(switches[part])

    def _tell_sum(self, node: Any, switch: Callable[[Any], None]) -> None:
        """A node that adds to a parameter's gradient."""
        if id(node.variable) not in self._sums:
            self._sums[id(node.variable)] = node
            self._handles.append(node.register_prehook(switch))

    def _switching_to(self, part: Part) -> Callable[[Any], None]:
        label = Label(part, Phase.backward)

        def switch(_gradients: Any) -> None:
            self._stopwatch.switch(label)

        return switch


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """While entered, an object (or a module) has this function under the name."""
    own = vars(owner)
    is_own, before = name in own, own.get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a function has returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
