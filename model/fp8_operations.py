"""What FP8 products are made of, as the device can do it: plain PyTorch, or `model/kernels`.

A layer with one matrix is a group of one expert that has all rows.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.backends import Backend, choose_fp8
from model.fp8 import Quantised, quantise_tiles
from model.fp8_product import grouped_multiply, grouped_multiply_transposed, grouped_outer


class Operations(NamedTuple):
    """Each as the function of that name in `model/fp8.py`, `model/fp8_product.py` or here."""

    quantise_tiles: Callable[..., Quantised]
    swiglu_into_tiles: Callable[..., Quantised]
    grouped_multiply: Callable[..., Tensor]
    grouped_multiply_transposed: Callable[..., Tensor]
    grouped_outer: Callable[..., Tensor]


def swiglu_into_tiles(gated: Float[Tensor, "M F"], upped: Float[Tensor, "M F"]) -> Quantised:
    """SwiGLU's result in E4M3 tiles, rounded but once."""
    return quantise_tiles(F.silu(gated.float()) * upped.float())


REFERENCE = Operations(
    quantise_tiles,
    swiglu_into_tiles,
    grouped_multiply,
    grouped_multiply_transposed,
    grouped_outer,
)


@cache
def operations_on(device: torch.device) -> Operations:
    """The operations for tensors on that device."""
    if choose_fp8(device).backend is Backend.reference:
        return REFERENCE
    return triton_operations()


def triton_operations() -> Operations:
    """The kernels'; imported only here, since triton need not be installed."""
    from model.kernels.grouped import grouped_multiply, grouped_multiply_transposed
    from model.kernels.grouped_outer import grouped_outer
    from model.kernels.quantise import quantise_tiles
    from model.kernels.swiglu import swiglu_into_tiles

    return Operations(
        quantise_tiles,
        swiglu_into_tiles,
        grouped_multiply,
        grouped_multiply_transposed,
        grouped_outer,
    )
