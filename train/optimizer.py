"""The optimizer: AdamW, which parameters decay, and how its moments are kept."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from train.adamw import AdamW
from train.moments import SLOWEST_IN_BF16, Moments
from train.quantised_moments import HAS_LIBRARY


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
    #: The number that keeps each element of a moment between steps: 4, 2 or 1 bytes (int8 needs
    #: bitsandbytes). It may change when a run continues.
    moments: Moments = Moments.fp32
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


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> AdamW:
    """AdamW over the groups; the learning rate is set at each step."""
    return AdamW(
        groups,
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        moments=config.moments,
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
    if config.moments is Moments.bf16:
        for name in ("beta1", "beta2"):
            if getattr(config, name) > SLOWEST_IN_BF16:
                raise ValueError(
                    f"optimizer.{name}={getattr(config, name)} is too slow for "
                    f"optimizer.moments=bf16: BF16 would round its decay away; choose at most "
                    f"{SLOWEST_IN_BF16:.3f}, or optimizer.moments=fp32"
                )
    if config.moments is Moments.int8 and not HAS_LIBRARY:
        raise ValueError(
            "optimizer.moments=int8 needs bitsandbytes, which is not installed; run "
            "pip install 'bitsandbytes>=0.50', or choose optimizer.moments=bf16"
        )
