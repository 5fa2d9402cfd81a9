"""How an optimizer keeps a moment: in fp32, BF16 or 8 bits. The arithmetic on it is always fp32.

A moment is one number per parameter. An optimizer reads a stretch of it as fp32, computes, and
writes the stretch back; between steps only the stored form exists.
"""

from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from train.optimizer.quantised_moments import QuantisedMoments

#: Elements read, updated and written back at once: two moments' stretches fit a core's cache.
#: On an accelerator more at once, to keep it busy. A multiple of every format's block.
STRETCH = {"cpu": 2**16}
STRETCH_ON_ACCELERATOR = 2**24


class Moments(StrEnum):
    """The number that stores each element of a moment, in 4, 2 or 1 bytes."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class MomentFormat(Protocol):
    """A stored form of moments. `state` is the optimizer's for one parameter, `name` the moment.

    What is stored stands in `state` as tensors, the elements under `name` itself.
    """

    is_read_in_place: bool  # `read` gives the stored elements themselves, and makes none

    def start(self, state: dict[str, Any], name: str, parameter: Tensor) -> None:
        """Store zeros."""

    def read(self, state: dict[str, Any], name: str, part: slice) -> Tensor:
        """A stretch of the flattened moment in fp32, which the caller may overwrite."""

    def write(self, state: dict[str, Any], name: str, part: slice, values: Tensor) -> None:
        """Store what `read` gave, changed."""

    def open(self, state: dict[str, Any], name: str) -> Tensor:
        """All elements, 1-D, as a checkpoint sees them; filling them counts from `close` on."""

    def close(self, state: dict[str, Any], name: str) -> None:
        """Take over what was filled into `open`'s elements, if anything was opened."""


class FloatMoments:
    """Moments as they are (fp32), or rounded to the nearest BF16.

    DeepSeek-V3 keeps both moments in BF16 (arXiv:2412.19437, 3.3.1). The paper doesn't say how it
    rounds; to nearest is enough as long as a step can move a moment by more than half of BF16's
    spacing (`SLOWEST_IN_BF16`).
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.is_read_in_place = dtype is torch.float32

    def start(self, state: dict[str, Any], name: str, parameter: Tensor) -> None:
        state[name] = torch.zeros_like(parameter, dtype=self.dtype)

    def read(self, state: dict[str, Any], name: str, part: slice) -> Tensor:
        return state[name].view(-1)[part].float()  # in fp32, the stored elements themselves

    def write(self, state: dict[str, Any], name: str, part: slice, values: Tensor) -> None:
        if not self.is_read_in_place:
            state[name].view(-1)[part].copy_(values)

    def open(self, state: dict[str, Any], name: str) -> Tensor:
        return state[name].view(-1)

    def close(self, state: dict[str, Any], name: str) -> None:
        """Nothing to do: what was opened is what is stored."""


#: BF16's spacing is 2^-7 of a number just above a power of two. A moment shrinks by (1 - beta) of
#: itself in a step without gradient; where that is less than half of the spacing, rounding to
#: nearest undoes it and the moment never shrinks again.
SLOWEST_IN_BF16 = 1 - 2**-8


def build_format(moments: Moments) -> MomentFormat:
    match moments:
        case Moments.fp32:
            return FloatMoments(torch.float32)
        case Moments.bf16:
            return FloatMoments(torch.bfloat16)
        case Moments.int8:
            return QuantisedMoments()


def stretches(parameter: Tensor) -> list[slice]:
    """The parts in which a flattened parameter's moments are updated."""
    length = STRETCH.get(parameter.device.type, STRETCH_ON_ACCELERATOR)
    return [slice(start, start + length) for start in range(0, parameter.numel(), length)]
