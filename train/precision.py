"""Numbers that the model computes in."""

from dataclasses import dataclass, field
from enum import StrEnum

import torch

from train.watch.drift import DriftConfig, check_drift


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"

    @property
    def torch(self) -> torch.dtype:
        return {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}[self]


@dataclass(slots=True, kw_only=True)
class PrecisionConfig:
    #: Weights and activations of the forward and backward pass. Master weights and
    #: accumulated gradients are fp32 in any case, and so are router, softmax and loss; moments are
    #: as `optimizer.moments` says.
    dtype: Dtype = Dtype.fp32
    #: Whether the blocks' products with weights are of FP8 numbers summed in fp32, as DeepSeek-V3's
    #: (docs/precision.md), and rows travel to their experts in FP8.
    fp8: bool = False
    drift: DriftConfig = field(default_factory=DriftConfig)


def check_precision(config: PrecisionConfig) -> None:
    """Refuse, with a ValueError, what can't be computed in."""
    check_drift(config.drift)
