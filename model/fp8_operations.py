"""What FP8 products are made of, as the device can do it: plain PyTorch, or `model/kernels`.

A layer with one matrix is a group of one expert that has all rows.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.backends import Backend, choose_fp8
from model.fp8 import Quantised, dequantise_tiles, quantise_blocks, quantise_tiles
from model.fp8_product import grouped_multiply, grouped_multiply_transposed, grouped_outer


class SwiGLUGradients(NamedTuple):
    inner: Float[Tensor, "M F"]  # the result, computed again
    d_gated: Float[Tensor, "M F"]
    d_upped: Float[Tensor, "M F"]


class Operations(NamedTuple):
    """Each as the function of that name in `model/fp8.py`, `model/fp8_product.py` or here."""

    quantise_tiles: Callable[..., Quantised]
    quantise_blocks: Callable[..., Quantised]
    swiglu_into_tiles: Callable[..., Quantised]
    swiglu_backward: Callable[..., SwiGLUGradients]
    grouped_multiply: Callable[..., Tensor]
    grouped_multiply_transposed: Callable[..., Tensor]
    grouped_outer: Callable[..., Tensor]


def swiglu_into_tiles(gated: Float[Tensor, "M F"], upped: Float[Tensor, "M F"]) -> Quantised:
    """SwiGLU's result in E4M3 tiles, rounded but once."""
    return quantise_tiles(F.silu(gated.float()) * upped.float())


def swiglu_backward(
    d_inner: Float[Tensor, "M F"], gated: Quantised, upped: Quantised, *, dtype: torch.dtype
) -> SwiGLUGradients:
    """SwiGLU's result and gradients in that dtype, from its inputs' tiles."""
    gate, up = dequantise_tiles(gated), dequantise_tiles(upped)
    activated, d_inner = F.silu(gate), d_inner.float()
    d_gated = torch.ops.aten.silu_backward(d_inner * up, gate)
    of_dtype = (part.to(dtype) for part in (activated * up, d_gated, d_inner * activated))
    return SwiGLUGradients(*of_dtype)


REFERENCE = Operations(
    quantise_tiles,
    quantise_blocks,
    swiglu_into_tiles,
    swiglu_backward,
    grouped_multiply,
    grouped_multiply_transposed,
    grouped_outer,
)


def operations_on(device: torch.device) -> Operations:
    """The operations for tensors on that device."""
    match choose_fp8(device).backend:
        case Backend.reference:
            return REFERENCE
        case Backend.triton:
            return triton_operations()
        case library:
            return library_operations(library)


@cache
def triton_operations() -> Operations:
    """The kernels'; imported only here, since triton need not be installed."""
    from model.kernels.grouped import grouped_multiply, grouped_multiply_transposed
    from model.kernels.grouped_outer import grouped_outer
    from model.kernels.quantise import quantise_blocks, quantise_tiles
    from model.kernels.swiglu import swiglu_backward, swiglu_into_tiles

    return Operations(
        quantise_tiles,
        quantise_blocks,
        swiglu_into_tiles,
        swiglu_backward,
        grouped_multiply,
        grouped_multiply_transposed,
        grouped_outer,
    )


@cache
def library_operations(library: Backend) -> Operations:
    """The kernels', but for the products that torch's scaled_mm or DeepGEMM takes."""
    if library is Backend.torch:
        from model.kernels.scaled_mm import take_scaled_mm

        return take_scaled_mm(triton_operations())
    from model.kernels.deep_gemm import take_deep_gemm

    return take_deep_gemm(triton_operations(), import_module("deep_gemm"))
