"""Recomputation: what the backward pass computes again instead of keeping it.

`full` keeps each block's input and runs the block again. `selective` is DeepSeek-V3's choice
(arXiv:2412.19437, 3.2.3) and the experts' inner activations: the model marks with `rebuild` what is
cheap to compute again. Nothing is sent or counted twice by it. `model/memory.py` counts what each
mode keeps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from model.saved import Pack, StandIn, current_pack, saving, unpack


class Recompute(StrEnum):
    """What is computed again: nothing, results that are cheap to have again, or whole blocks."""

    none = "none"
    selective = "selective"
    full = "full"


Output = TypeVar("Output")
Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


def rebuild(function: Callable[..., Result], *inputs: Any) -> Result:
    """`function(*inputs)`, of which only the inputs are kept for backward under `rebuilding`.

    Whoever saves a result (or a view of it) for the backward pass is given it anew there; so is
    what the function itself saved. It runs again once, when the first of these is asked for, and
    must be deterministic. Elsewhere, and without gradients, this is a plain call.
    """
    promises = _promises.get()
    if promises is None or not torch.is_grad_enabled():
        return function(*inputs)
    recipe = _Recipe(function, inputs, promises)
    with saved_tensors_hooks(recipe.note, recipe.saved), _plain():
        results = function(*inputs)
    promises.add(recipe, results)
    return results


def is_rebuilding() -> bool:
    """Whether a function that saves for backward by its own hand should save its inputs only."""
    return _promises.get() is not None


def recomputed(module: Callable[..., Output], *, mode: Recompute) -> Callable[..., Output]:
    """`module`, to be called now, computed again in the backward pass as the mode says."""
    if mode is Recompute.none or not torch.is_grad_enabled():
        return module
    if mode is Recompute.full:
        return _plain()(partial(checkpoint, module, use_reentrant=False))
    return rebuilding()(module)


@contextmanager
def rebuilding() -> Iterator[None]:
    """Within it, what `rebuild` returns is not kept for the backward pass."""
    promises = _Promises()
    token = _promises.set(promises)
    try:
        with saving(promises):
            yield
    finally:
        _promises.reset(token)


@contextmanager
def _plain() -> Iterator[None]:
    """Within it, `rebuild` is a plain call: what it is used in is computed again as a whole."""
    token = _promises.set(None)
    try:
        yield
    finally:
        _promises.reset(token)


class _Promise(NamedTuple):
    """A result, or a view of one, that can be had again."""

    recipe: "_Recipe"
    result: int
    place: tuple[Any, ...]  # size, stride and offset in the result's storage

    def value(self) -> Tensor:
        return self.recipe.result(self.result).as_strided(*self.place)


class _Promises:
    """Replaces tensors that autograd saves by promises, where their storage was promised."""

    def __init__(self) -> None:
        # A weak reference frees the memory but keeps the storage's identity from being reused.
        self._promised: dict[StorageWeakRef, tuple[_Recipe, int]] = {}
        self._keep = current_pack.get()

    def add(self, recipe: "_Recipe", results: Tensor | tuple[Tensor, ...]) -> None:
        for i, result in enumerate(_as_tuple(results)):
            self._promised[StorageWeakRef(result.untyped_storage())] = (recipe, i)

    def __call__(self, tensor: Tensor) -> Tensor | StandIn:
        found = self._promised.get(StorageWeakRef(tensor.untyped_storage()))
        if found is None:
            return self._keep(tensor)
        return _Promise(*found, (tensor.size(), tensor.stride(), tensor.storage_offset()))


class _Recipe:
    """A function and its inputs: the results, and what it saved on the way, when asked for."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...], pack: Pack) -> None:
        self._function = function
        self._inputs = [pack(x) if isinstance(x, Tensor) else x for x in inputs]
        self._need_grads = [x.requires_grad if isinstance(x, Tensor) else None for x in inputs]
        self._num_saved = 0
        self._saved: dict[int, Tensor] = {}
        self._results: tuple[Tensor, ...] = ()

    def note(self, _: Tensor) -> int:
        """Called for each tensor that the function saves: keeps its number in its place."""
        self._num_saved += 1
        return self._num_saved - 1

    def saved(self, number: int) -> Tensor:
        """What `note` was given; results are forgotten with the last, no one needs them then."""
        if number not in self._saved:
            self._run()
        tensor = self._saved.pop(number)
        if not self._saved:
            self._results = ()
        return tensor

    def result(self, number: int) -> Tensor:
        if not self._results:
            self._run()
        return self._results[number]

    def _run(self) -> None:
        inputs = [
            x if needs_grad is None else unpack(x).detach().requires_grad_(needs_grad)
            for x, needs_grad in zip(self._inputs, self._need_grads, strict=True)
        ]
        saved: list[Tensor] = []
        with torch.enable_grad(), saved_tensors_hooks(lambda x: saved.append(x.detach()), _refuse):
            results = self._function(*inputs)
        assert len(saved) == self._num_saved, "a function to rebuild must be deterministic"
        self._saved = dict(enumerate(saved))
        self._results = tuple(result.detach() for result in _as_tuple(results))


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def _refuse(_: None) -> Tensor:
    raise AssertionError("a rebuilt graph is for its tensors only")


_promises: ContextVar[_Promises | None] = ContextVar("promises", default=None)
