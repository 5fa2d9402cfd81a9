"""The optimizer: AdamW, and which parameters decay."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(slots=True, kw_only=True)
class OptimizerConfig:
    #: The algorithm; set by the group's option.
    kind: str = "adamw"
    #: Decay rate of the first moment.
    beta1: float = 0.9
    #: Decay rate of the second moment.
    beta2: float = 0.95
    #: Added to the root of the second moment.
    eps: float = 1e-8
    #: Decoupled weight decay, on matrices only.
    weight_decay: float = 0.1
    #: Largest global gradient norm, over all experts of all ranks; 0 does not clip.
    clip_norm: float = 1.0
    #: Steps in a row whose gradients are not finite (each is skipped) before the run stops.
    max_skipped_steps: int = 10


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms, biases and gains without. Groups without members go."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "name": "decayed",
            "params": [parameter for parameter in trained if parameter.ndim >= 2],
            "weight_decay": config.weight_decay,
        },
        {
            "name": "undecayed",
            "params": [parameter for parameter in trained if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the groups; the learning rate is set at each step."""
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuse, with a ValueError, rates outside their ranges."""
    if config.kind != "adamw":
        raise ValueError(f"optimizer.kind={config.kind} does not exist; choose adamw")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"optimizer.{name}={getattr(config, name)} must lie in [0, 1)")
    for name in ("eps", "weight_decay", "clip_norm"):
        if getattr(config, name) < 0:
            raise ValueError(f"optimizer.{name}={getattr(config, name)} must not be negative")
    if config.max_skipped_steps < 1:
        raise ValueError(
            f"optimizer.max_skipped_steps={config.max_skipped_steps} must be at least 1"
        )
