"""In an MoE layer the host reads its device's memory once, whatever the layer does with it."""

import traceback
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.init import initialise
from model.moe import MoE, MoEConfig
from model.router import GroupScore, RouterConfig
from tests.ranks import ranks

DIM = 16
CONFIG = MoEConfig(
    num_experts=8,
    top_k=2,
    expert_dim=12,
    device_balance_loss_weight=0.1,
    router=RouterConfig(num_groups=4, top_groups=2, group_score=GroupScore.top2_sum),
)
# What must know values, or sizes that depend on values.
READING = {
    *("cpu", "item", "tolist", "numpy", "nonzero", "masked_select", "unique", "equal", "bincount"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
}


class OnDevice(Tensor):
    """Stands for a tensor that the host can't see: what is made of it is one too, and who reads it
    is noted. Reading gives plain tensors."""

    reads: list[str]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        is_masked = name in ("__getitem__", "__setitem__") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if name in READING or is_masked:
            reader = traceback.extract_stack(limit=2)[0]
            cls.reads.append(f"{name} in {reader.name}")
        if name == "cpu":
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


class Reads(TorchDispatchMode):
    """Notes the same of any tensor, below autograd: the backward pass makes plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "is_nonzero", "_unique2", *READING}:
            self.noted.append(name)
        return func(*args, **(kwargs or {}))


def reads_of_a_layer(config: MoEConfig, group: dist.ProcessGroup | None) -> list[str]:
    """Forward and backward; what was read in them."""
    moe = MoE(config, dim=DIM, expert_group=group)
    initialise(moe, seed=3, std=0.3)
    OnDevice.reads = []
    x = torch.randn(2, 20, DIM, requires_grad=True)
    counted = torch.rand(2, 20) < 0.8
    out = moe((x * 1.0).as_subclass(OnDevice), counted.as_subclass(OnDevice))
    assert isinstance(out.hidden, OnDevice), "no step has left the device"
    assert isinstance(out.load, OnDevice)
    loss = out.hidden.sum() + out.balance_loss + out.group_balance_losses.sum()
    with Reads() as backward:
        loss.as_subclass(Tensor).backward()
    return OnDevice.reads + backward.noted


def test_the_host_reads_the_counts_and_nothing_else() -> None:
    assert reads_of_a_layer(CONFIG, None) == ["cpu in _gather"]


@ranks(2)
def test_over_ranks_the_host_reads_the_counts_and_nothing_else() -> None:
    assert reads_of_a_layer(CONFIG, dist.group.WORLD) == ["cpu in _gather"]


@pytest.mark.parametrize("limit", [10, 1000])
def test_with_a_bound_on_rows_it_is_the_same(limit: int) -> None:
    config = replace(CONFIG, max_tokens_per_chunk=limit)
    assert reads_of_a_layer(config, None) == ["cpu in _gather"]
