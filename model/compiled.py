"""Regions: chains of element-wise operations that torch.compile turns into one kernel each.

With `compile=true` these alone are compiled, never a block: sizes that follow from the routing,
exchanges between ranks and what recomputation keeps would break a block's graph in every layer. A
region is one graph; torch makes it again for none and one row, other numbers of dimensions and
without gradients.
"""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.backends import find_c_compiler

MOST_GRAPHS = 64  # of a region

Samples = Callable[[Tensor], tuple[Any, ...]]


class Traced(NamedTuple):
    """What torch.compile makes of a region."""

    name: str
    num_graphs: int
    breaks: list[str]  # why the graph ends before the region does

    def describe(self) -> str:
        reasons = f": {'; '.join(self.breaks)}" if self.breaks else ""
        return f"{self.name}: graphs {self.num_graphs}, breaks {len(self.breaks)}{reasons}"


class Region:
    """A function of tensors, called as it is or compiled."""

    def __init__(self, function: Callable[..., Tensor], samples: Samples) -> None:
        self.name = function.__name__
        self.__doc__ = function.__doc__
        self._plain = self._run = function
        self._samples = samples

    def __call__(self, *inputs: Any) -> Tensor:
        return self._run(*inputs)

    def compile(self) -> None:
        """From the next call on; the compiler runs in that call."""
        self._run = torch.compile(self._plain, dynamic=True)

    def leave_plain(self) -> None:
        self._run = self._plain

    def trace(self, device: torch.device, dtype: torch.dtype) -> Traced:
        """Without running the compiler."""
        like = torch.zeros(4, 16, device=device, dtype=dtype, requires_grad=True)
        found = torch._dynamo.explain(self._plain)(*self._samples(like))
        reasons = [str(one.reason).splitlines()[0] for one in found.break_reasons]
        return Traced(self.name, found.graph_count, reasons)


REGIONS: list[Region] = []


def region(samples: Samples) -> Callable[[Callable[..., Tensor]], Region]:
    """Make a function a region; `samples` gives inputs for it, made of a tensor [4, 16]."""

    def register(function: Callable[..., Tensor]) -> Region:
        REGIONS.append(Region(function, samples))
        return REGIONS[-1]

    return register


def compile_regions(is_wanted: bool, *, device: torch.device, dtype: torch.dtype) -> list[Traced]:
    """Compile all regions of the process from now on, or none; what they come to.

    Raises:
        ValueError: There is no compiler.
    """
    for one in REGIONS:
        one.leave_plain()
    if not is_wanted:
        return []
    check_compiler(device)
    # All users of a region share its graphs; beyond the limit torch goes on without compiling.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    traced = [one.trace(device, dtype) for one in REGIONS]
    for one in REGIONS:
        one.compile()
    return traced


def check_compiler(device: torch.device) -> None:
    """Refuse, with a ValueError, a device for which torch.compile finds nothing to compile with."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise ValueError(
            "compile=true needs triton on a GPU, which is not installed; install thrifty[kernels], "
            "or choose compile=false"
        )
    if device.type == "cuda" and find_c_compiler() is None:
        raise ValueError(
            "compile=true needs a C compiler on a GPU, but there is neither gcc nor clang; install "
            "one, name one in CC, or choose compile=false"
        )
    compiler = os.environ.get("CXX", "g++")  # as torch looks for it
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"compile=true needs a C++ compiler on a CPU, but there is no {compiler}; install one, "
            "name one in CXX, or choose compile=false"
        )
