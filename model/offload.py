"""Activation offload: what blocks keep for the backward pass waits in host memory.

A block's tensors leave while the next block runs, on a stream of their own, and return while the
block after it is in its backward pass: at any time two blocks' tensors are on the device, and those
of the last two never leave. On the CPU the same copies are made, to no use but a rehearsal.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from model.saved import keep, saving

# Smaller tensors stay: a copy would cost more time than they are worth. A rehearsal takes all.
MIN_BYTES = {"cpu": 0, "cuda": 1 << 20}


class Stash:
    """What the blocks of one forward pass have sent away, block by block."""

    def __init__(self) -> None:
        self._loads: list[_Load] = []

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within it, one block runs, and what it saves for the backward pass leaves the device."""
        if not torch.is_grad_enabled():
            yield
            return
        for load in self._loads[:-1]:
            load.depart()
        self._loads = self._loads[-1:]
        load = _Load(before=self._loads[-1] if self._loads else None)
        self._loads.append(load)
        with saving(load.pack):
            yield

    def depart(self) -> None:
        """Let the last blocks' tensors leave too: their backward pass is not what comes next."""
        for load in self._loads:
            load.depart()


class Away(NamedTuple):
    """A saved tensor that is elsewhere: a view of a storage."""

    cargo: "_Cargo"
    dtype: torch.dtype
    place: tuple[Any, ...]  # offset, size, stride

    def value(self) -> Tensor:
        storage = self.cargo.load.arrive(self.cargo)
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(storage, *self.place)


class _Cargo:
    """One storage: on the device, on its way, or in host memory."""

    def __init__(self, load: "_Load", source: torch.UntypedStorage) -> None:
        self.load = load
        self.device: torch.UntypedStorage | None = source
        self.host = torch.empty(
            source.nbytes(), dtype=torch.uint8, pin_memory=source.device.type == "cuda"
        )
        self.source_device = source.device


class _Load:
    """All that one block saves."""

    def __init__(self, *, before: "_Load | None") -> None:
        self.before = before
        self._cargos: dict[StorageWeakRef, weakref.ref[_Cargo]] = {}
        self._staying: list[_Cargo] = []  # copied already, or on the way, and not yet let go
        self._departed: torch.cuda.Event | None = None
        self._arrived: torch.cuda.Event | None = None
        self._is_called_back = False

    def pack(self, tensor: Tensor) -> "Tensor | Away":
        """Send a tensor's storage away, once, however many save it."""
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        storage = tensor.untyped_storage()
        if is_weight or storage.nbytes() < MIN_BYTES[storage.device.type]:
            return keep(tensor)
        known = self._cargos.get(StorageWeakRef(storage))
        cargo = known() if known is not None else None
        if cargo is None:
            cargo = _Cargo(self, storage)
            self._cargos[StorageWeakRef(storage)] = weakref.ref(cargo)
            self._staying.append(cargo)
            self._departed = _copy(cargo.host, _as_bytes(storage))
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return Away(cargo, tensor.dtype, place)

    def depart(self) -> None:
        """Free the device's memory; it is used again after the copies, in the device's order."""
        _wait(self._departed)
        for cargo in self._staying:
            cargo.device = None
        self._staying.clear()

    def arrive(self, cargo: _Cargo) -> torch.UntypedStorage:
        """A storage, back on the device; the block before calls its own back meanwhile."""
        self.call_back()
        _wait(self._arrived)
        if self.before is not None:
            self.before.call_back()
        assert cargo.device is not None, "all that is still wanted has been called back"
        return cargo.device

    def call_back(self) -> None:
        """Begin to copy to the device all that is still wanted, once."""
        if self._is_called_back:
            return
        self._is_called_back = True
        self._staying.clear()  # from here on each storage lives as long as it is wanted
        for reference in self._cargos.values():
            cargo = reference()
            if cargo is not None and cargo.device is None:
                target = torch.empty(
                    cargo.host.numel(), dtype=torch.uint8, device=cargo.source_device
                )
                self._arrived = _copy(target, cargo.host)
                cargo.device = target.untyped_storage()


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _copy(target: Tensor, source: Tensor) -> "torch.cuda.Event | None":
    """Copy between host and device beside the device's work; the event says when it is done."""
    device = next((x.device for x in (target, source) if x.device.type == "cuda"), None)
    if device is None:
        target.copy_(source)
        return None
    beside = _stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    if target.device == device:
        target.record_stream(beside)  # should it be dropped before anyone has waited for it
    with torch.cuda.stream(beside):
        target.copy_(source, non_blocking=True)
        return beside.record_event()


def _wait(event: "torch.cuda.Event | None") -> None:
    """Hold the device's further work, not the host, until the event."""
    if event is not None:
        event.wait()


@cache
def _stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)
