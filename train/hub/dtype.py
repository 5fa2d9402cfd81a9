"""Number formats of a hub folder: how a tensor of ours is stored in each, and read back."""

from enum import StrEnum

import torch
from torch import Tensor

from model.fp8 import quantise_blocks
from train.checkpoint.tensor_stream import TensorSpec
from train.hub.fp8_blocks import count_blocks, dequantise
from train.hub.names import HubTensor

SCALE = "_scale_inv"  # after the name of a matrix in FP8: its blocks' scales


class HubDtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"

    @property
    def torch(self) -> torch.dtype:
        """The format of what is not in FP8 blocks."""
        return torch.float32 if self is HubDtype.fp32 else torch.bfloat16


def stored_specs(tensor: HubTensor, dtype: HubDtype) -> list[TensorSpec]:
    """What a folder of that format holds for the tensor: itself, and scales if it is in FP8."""
    if tensor.is_bias:
        return [TensorSpec(tensor.name, torch.float32, tensor.shape)]
    if dtype is HubDtype.fp8 and tensor.is_quantised:
        return [
            TensorSpec(tensor.name, torch.float8_e4m3fn, tensor.shape),
            TensorSpec(tensor.name + SCALE, torch.float32, count_blocks(tensor.shape)),
        ]
    return [TensorSpec(tensor.name, dtype.torch, tensor.shape)]


def encode(tensor: HubTensor, values: Tensor, dtype: HubDtype) -> list[Tensor]:
    """The tensors of `stored_specs` for fp32 values."""
    if tensor.is_bias:
        return [values]
    if dtype is HubDtype.fp8 and tensor.is_quantised:
        return list(quantise_blocks(values))
    return [values.to(dtype.torch)]


def decode(stored: list[Tensor]) -> Tensor:
    """The fp32 values of what `encode` gave."""
    values, *scales = stored
    return dequantise(values, scales[0]) if scales else values.float()
