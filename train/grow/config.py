"""What may change when a run grows, and the choices that go with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from model.config import ModelConfig
from train.config_diff import Change, diff_values


class Shrink(StrEnum):
    """Fewer experts: the least used go, or are averaged into those nearest to them."""

    prune = "prune"
    merge = "merge"


class Repeat(StrEnum):
    """Further layers: copies that change nothing yet (zero output projections), or plain copies."""

    identity = "identity"
    copy = "copy"


class Order(StrEnum):
    """Where a copied layer stands: right behind its original, or behind all of them."""

    interleave = "interleave"
    stack = "stack"


class GrownMoments(StrEnum):
    copy = "copy"
    zero = "zero"


@dataclass(slots=True, kw_only=True)
class GrowChoices:
    #: Whether a run that is continued with another model (expert counts, layers) grows in its own
    #: folder; a leave for one start. thrifty grow makes a new run and needs none.
    on_resume: bool = False
    #: Standard deviation of what is added to copies of experts, relative to each tensor's own.
    #: Without it, clones that every token visits together stay equal for ever.
    noise: float = 0.0
    #: What is taken off the routing bias of clones that `top_k` has no room for; null takes so much
    #: that no token can choose one. Less lets them in sooner and changes the function.
    offset: float | None = None
    #: How fewer experts are made.
    shrink: Shrink = Shrink.prune
    #: What a repeated layer does at first.
    repeat: Repeat = Repeat.identity
    #: Where repeated layers stand.
    order: Order = Order.interleave
    #: Whether the optimizer's moments are copied with their weights or start from zero.
    moments: GrownMoments = GrownMoments.copy
    #: Sequences of the validation split on which the change of the function is measured.
    sequences: int = 8
    #: Largest change of the logits, relative to the largest, with which the run is written; null
    #: writes in any case.
    max_error: float | None = None


@dataclass(slots=True, kw_only=True)
class Growth:
    """Two models, and how the second comes from the first."""

    old: ModelConfig
    new: ModelConfig
    seed: int
    choices: GrowChoices = field(default_factory=GrowChoices)


GROWABLE = (
    "model.num_layers",
    "model.num_dense_layers",
    "model.moe.num_experts",
    "model.moe.top_k",
    "model.moe.num_shared_experts",
    "model.moe.router.num_groups",
    "model.moe.router.top_groups",
)
# These steer the training and don't enter the function.
HARMLESS = (
    "model.moe.router.bias_update_speed",
    "model.moe.balance_loss_weight",
    "model.moe.device_balance_loss_weight",
    "model.moe.communication_balance_loss_weight",
    "model.mtp.loss_weight",
)


def is_growable(changes: list[Change]) -> bool:
    """Whether `thrifty grow` could make all of these changes of a model."""
    keys = [change.key for change in changes]
    return bool(keys) and all(key in GROWABLE or key.startswith("model.moe") for key in keys)


def check_growth(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The changes of the model's section that grow it, harmless ones left out.

    Raises:
        ValueError: A key changes that no growth can; names it.
    """
    changes = diff_values({"model": old}, {"model": new})
    is_first_moe = old["moe"] is None
    for change in changes:
        if change.key in GROWABLE or change.key in HARMLESS:
            continue
        if is_first_moe and change.key.startswith("model.moe"):
            continue
        raise ValueError(
            f"{change}: thrifty grow can't change {change.key}; it changes "
            f"{', '.join(GROWABLE)}, or gives a dense model its first model.moe"
        )
    return [change for change in changes if change.key not in HARMLESS]


def check_choices(choices: GrowChoices) -> None:
    """Refuse, with a ValueError, numbers out of range."""
    for name in ("noise", "offset", "max_error"):
        value = getattr(choices, name)
        if value is not None and value < 0:
            raise ValueError(f"grow.{name}={value} must not be negative")
    if choices.sequences < 1:
        raise ValueError(
            f"grow.sequences={choices.sequences} must be at least 1: the change of the function is "
            "measured before anything is written"
        )
