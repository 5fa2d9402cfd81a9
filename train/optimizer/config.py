"""The optimizer: which algorithm moves which parameter, which parameters decay, and settings."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn

from train.optimizer.adamw import MOMENTS, AdamW
from train.optimizer.moments import SLOWEST_IN_BF16, Moments
from train.optimizer.muon import MOMENTUM, AdjustLR, Muon, MuonSettings
from train.optimizer.quantised_moments import HAS_LIBRARY
from train.precision import Dtype


class Algorithm(StrEnum):
    adamw = "adamw"
    muon = "muon"


# Who moves a parameter under optimizer=muon; the first pattern found in its name counts. Muon is
# for maps between hidden states: not for tables of vectors (arXiv:2502.16982, 2.2), nor, as we
# choose, for the router, whose rows are scored one by one.
TABLE: tuple[tuple[str, Algorithm], ...] = (
    (r"^embed\.", Algorithm.adamw),
    (r"^head\.", Algorithm.adamw),
    (r"\.router\.", Algorithm.adamw),
    (r"norm\.weight$", Algorithm.adamw),
    (r"\.bias$", Algorithm.adamw),
    (r".", Algorithm.muon),
)


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


@dataclass(slots=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon for matrices; the settings of AdamW count for the rest."""

    kind: str = "muon"
    #: Decay rate of the momentum.
    momentum: float = 0.95
    #: Whether the momentum looks one step ahead.
    nesterov: bool = True
    #: Newton-Schulz iterations that orthogonalise an update.
    ns_steps: int = 5
    #: How a matrix's shape enters its learning rate: original suits Muon's own rates (about 0.02,
    #: see `lr_ratio`), match_rms_adamw those of AdamW.
    adjust_lr: AdjustLR = AdjustLR.match_rms_adamw
    #: Muon's learning rate over the schedule's, which AdamW's parameters follow.
    lr_ratio: float = 1.0
    #: Numbers that the iterations compute in; bf16 is enough (and what torch.optim.Muon does).
    iterate_in: Dtype = Dtype.bf16


OPTIMIZER_KINDS: dict[str, type[OptimizerConfig]] = {"adamw": OptimizerConfig, "muon": MuonConfig}


def algorithm_of(name: str, config: OptimizerConfig) -> Algorithm:
    """What moves the parameter of this name."""
    if not isinstance(config, MuonConfig):
        return Algorithm.adamw
    return next(algorithm for pattern, algorithm in TABLE if re.search(pattern, name))


def kept_states(name: str, config: OptimizerConfig) -> tuple[str, ...]:
    """What the optimizer keeps for the parameter of this name: one number for each element."""
    return (MOMENTUM,) if algorithm_of(name, config) is Algorithm.muon else MOMENTS


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms, biases and gains without. Groups without members go."""
    members: dict[tuple[Algorithm, bool], list[nn.Parameter]] = {
        (Algorithm.adamw, True): [],
        (Algorithm.adamw, False): [],
        (Algorithm.muon, True): [],
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[algorithm_of(name, config), parameter.ndim >= 2].append(parameter)
    return [
        {
            "name": f"{algorithm}, {'decayed' if is_matrix else 'undecayed'}",
            "params": parameters,
            "weight_decay": config.weight_decay if is_matrix else 0.0,
            "algorithm": algorithm.value,
        }
        for (algorithm, is_matrix), parameters in members.items()
        if parameters
    ]


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> AdamW:
    """The optimizer over the groups; the learning rate is set at each step."""
    settings: dict[str, Any] = {
        "lr": 0.0,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "moments": config.moments,
    }
    if not isinstance(config, MuonConfig):
        return AdamW(groups, **settings)
    muon = MuonSettings(
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        adjust_lr=config.adjust_lr,
        lr_ratio=config.lr_ratio,
        dtype=config.iterate_in.torch,
    )
    return Muon(groups, muon=muon, **settings)


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuse, with a ValueError, rates outside their ranges."""
    if OPTIMIZER_KINDS.get(config.kind) is not type(config):
        raise ValueError(
            f"optimizer.kind={config.kind} can't be set by itself; choose optimizer=NAME, NAME one "
            f"of {', '.join(OPTIMIZER_KINDS)}"
        )
    if isinstance(config, MuonConfig):
        _check_muon(config)
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
    _check_moments(config)


def _check_muon(config: MuonConfig) -> None:
    if not 0 <= config.momentum < 1:
        raise ValueError(f"optimizer.momentum={config.momentum} must lie in [0, 1)")
    if not 1 <= config.ns_steps < 100:
        raise ValueError(f"optimizer.ns_steps={config.ns_steps} must lie between 1 and 99")
    if config.lr_ratio <= 0:
        raise ValueError(f"optimizer.lr_ratio={config.lr_ratio} must be positive")


def _check_moments(config: OptimizerConfig) -> None:
    decays = ("beta1", "beta2", *(("momentum",) if isinstance(config, MuonConfig) else ()))
    for name in decays:
        if config.moments is Moments.bf16 and getattr(config, name) > SLOWEST_IN_BF16:
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
