"""Saved tensors: what autograd keeps for the backward pass, and what may stand in for one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@runtime_checkable
class StandIn(Protocol):
    """Kept in the place of a tensor that can be had again."""

    def value(self) -> Tensor: ...


Pack = Callable[[Tensor], Tensor | StandIn]


def keep(tensor: Tensor) -> Tensor:
    """The tensor itself. A parameter stays one: under ZeRO-3 its data comes and goes."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return tensor.detach()  # its history would close a cycle of references


def unpack(packed: Tensor | StandIn) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.value()


@contextmanager
def saving(pack: Pack) -> Iterator[None]:
    """Within it, `pack` decides what is kept of each tensor that is saved.

    Of several, torch asks only the innermost; it may pass on to `current_pack` as it was outside.
    """
    token = current_pack.set(pack)
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        current_pack.reset(token)


current_pack: ContextVar[Pack] = ContextVar("current_pack", default=keep)
