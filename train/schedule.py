"""What changes over a run: rate, batch size, loss weights; pure functions of the step."""

import math
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import pairwise

from model.config import ModelConfig


@dataclass(slots=True, kw_only=True)
class BatchRampConfig:
    #: Sequences in the first steps' global batch; null starts at `schedule.batch_size`.
    start: int | None = None
    #: Steps over which the batch grows.
    steps: int = 0
    #: The batch grows by multiples of this many sequences; every layout must divide it.
    increment: int = 1


@dataclass(slots=True, kw_only=True)
class ChangeConfig:
    #: Steps from which each of `values` holds, until the next one's; rising.
    steps: list[int] = field(default_factory=list)
    #: The values, one for each of `steps`.
    values: list[float] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class ChangesConfig:
    """Settings that take other values in the course of the run."""

    #: The learning rate, in place of what the schedule's shape says.
    learning_rate: ChangeConfig = field(default_factory=ChangeConfig)
    #: model.mtp.loss_weight.
    mtp_loss_weight: ChangeConfig = field(default_factory=ChangeConfig)
    #: model.moe.router.bias_update_speed.
    bias_update_speed: ChangeConfig = field(default_factory=ChangeConfig)


@dataclass(slots=True, kw_only=True)
class ScheduleConfig:
    """Common to all schedules: warm-up, then what `kind` says."""

    #: Shape of the learning rate; set by the group's option.
    kind: str = "constant"
    #: Optimizer steps of the whole run.
    steps: int
    #: Sequences per optimizer step, over all ranks and micro-batches.
    batch_size: int
    #: Growth of the batch at the start of the run.
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    #: Highest learning rate.
    peak_lr: float
    #: Steps of linear warm-up from 0 to `peak_lr`.
    warmup_steps: int = 0
    #: Values that change at given steps.
    changes: ChangesConfig = field(default_factory=ChangesConfig)


@dataclass(slots=True, kw_only=True)
class ConstantSchedule(ScheduleConfig):
    """Warm-up, then `peak_lr` throughout."""

    kind: str = "constant"


@dataclass(slots=True, kw_only=True)
class CosineSchedule(ScheduleConfig):
    """Warm-up, constant, then half a cosine, then constant again: DeepSeek-V3's shape."""

    kind: str = "cosine"
    #: Steps at `peak_lr` after the warm-up.
    constant_steps: int = 0
    #: Steps of the cosine; null lets it reach the end of the run.
    decay_steps: int | None = None
    #: Learning rate after the cosine, as a share of `peak_lr`.
    final_ratio: float = 0.1


@dataclass(slots=True, kw_only=True)
class WSDSchedule(ScheduleConfig):
    """Warm-up, stable, decay (arXiv:2404.06395): a linear decay in the last steps."""

    kind: str = "wsd"
    #: Steps of the decay at the end of the run.
    decay_steps: int
    #: Learning rate at the last step, as a share of `peak_lr`.
    final_ratio: float = 0.0


@dataclass(slots=True, kw_only=True)
class MultiStepSchedule(ScheduleConfig):
    """Warm-up, then drops at shares of the run: DeepSeek LLM's and V2's shape."""

    kind: str = "multistep"
    #: Shares of `steps` at which the rate drops, rising.
    milestones: list[float] = field(default_factory=lambda: [0.8, 0.9])
    #: Learning rate after each milestone, as a share of `peak_lr`.
    ratios: list[float] = field(default_factory=lambda: [0.316, 0.1])


SCHEDULE_KINDS: dict[str, type[ScheduleConfig]] = {
    "constant": ConstantSchedule,
    "cosine": CosineSchedule,
    "wsd": WSDSchedule,
    "multistep": MultiStepSchedule,
}


def learning_rate(config: ScheduleConfig, step: int) -> float:
    """Learning rate of the update that takes the run from `step` to `step + 1`."""
    if step < config.warmup_steps:
        rate = config.peak_lr * (step + 1) / config.warmup_steps
    else:
        rate = config.peak_lr * _ratio(config, step)
    return _changed(rate, config.changes.learning_rate, step)


def model_at(config: ModelConfig, schedule: ScheduleConfig, step: int) -> ModelConfig:
    """The model's config with the values that the schedule's changes give it at `step`."""
    changes = schedule.changes
    if changes.mtp_loss_weight.steps:
        weight = _changed(config.mtp.loss_weight, changes.mtp_loss_weight, step)
        config = replace(config, mtp=replace(config.mtp, loss_weight=weight))
    if changes.bias_update_speed.steps and config.moe is not None:
        router = config.moe.router
        speed = _changed(router.bias_update_speed, changes.bias_update_speed, step)
        router = replace(router, bias_update_speed=speed)
        config = replace(config, moe=replace(config.moe, router=router))
    return config


def _changed(value: float, change: ChangeConfig, step: int) -> float:
    """`value`, or what the last change up to `step` made of it."""
    past = bisect_right(change.steps, step)
    return change.values[past - 1] if past else value


def _ratio(config: ScheduleConfig, step: int) -> float:
    """Share of the peak after the warm-up."""
    match config:
        case CosineSchedule():
            start = config.warmup_steps + config.constant_steps
            decay_steps = config.decay_steps or config.steps - start
            progress = min(max((step - start) / max(decay_steps, 1), 0.0), 1.0)
            share = (1 + math.cos(math.pi * progress)) / 2
            return config.final_ratio + (1 - config.final_ratio) * share
        case WSDSchedule():
            left = max(config.steps - 1 - step, 0) / config.decay_steps
            return config.final_ratio + (1 - config.final_ratio) * min(left, 1.0)
        case MultiStepSchedule():
            passed = bisect_right(config.milestones, step / config.steps)
            return 1.0 if passed == 0 else config.ratios[passed - 1]
        case _:
            return 1.0


def batch_size(config: ScheduleConfig, step: int) -> int:
    """Sequences in the global batch of step `step`."""
    ramp = config.batch_ramp
    if ramp.start is None or step >= ramp.steps:
        return config.batch_size
    levels = (config.batch_size - ramp.start) // ramp.increment
    return ramp.start + ramp.increment * (step * (levels + 1) // ramp.steps)


def check_schedule(config: ScheduleConfig) -> None:
    """Refuse, with a ValueError, a schedule that no run can follow."""
    for name in ("steps", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"schedule.{name}={getattr(config, name)} must be at least 1")
    if config.peak_lr <= 0:
        raise ValueError(f"schedule.peak_lr={config.peak_lr} must be positive")
    if not 0 <= config.warmup_steps <= config.steps:
        raise ValueError(
            f"schedule.warmup_steps={config.warmup_steps} must lie between 0 and "
            f"schedule.steps={config.steps}"
        )
    final_ratio = getattr(config, "final_ratio", 0.0)
    if final_ratio < 0:
        raise ValueError(f"schedule.final_ratio={final_ratio} must not be negative")
    _check_ramp(config)
    _check_changes(config)
    match config:
        case CosineSchedule():
            used = config.warmup_steps + config.constant_steps + (config.decay_steps or 0)
            if used > config.steps:
                raise ValueError(
                    f"schedule: warmup_steps + constant_steps + decay_steps = {used} exceed "
                    f"schedule.steps={config.steps}; shorten one of them"
                )
        case WSDSchedule():
            if not 1 <= config.decay_steps <= config.steps - config.warmup_steps:
                raise ValueError(
                    f"schedule.decay_steps={config.decay_steps} must lie between 1 and the "
                    f"{config.steps - config.warmup_steps} steps after the warm-up"
                )
        case MultiStepSchedule():
            rising = all(a < b for a, b in pairwise((0.0, *config.milestones, 1.0)))
            if len(config.milestones) != len(config.ratios) or not rising:
                raise ValueError(
                    f"schedule.milestones={config.milestones} must rise within (0, 1) and have "
                    f"one ratio each, but schedule.ratios={config.ratios}"
                )


def _check_ramp(config: ScheduleConfig) -> None:
    ramp = config.batch_ramp
    if ramp.start is None:
        return
    if ramp.increment < 1 or ramp.steps < 1:
        raise ValueError(
            f"schedule.batch_ramp: steps={ramp.steps} and increment={ramp.increment} must be at "
            "least 1; set start=null for no ramp"
        )
    if not 1 <= ramp.start <= config.batch_size:
        raise ValueError(
            f"schedule.batch_ramp.start={ramp.start} must lie between 1 and "
            f"schedule.batch_size={config.batch_size}"
        )
    if (config.batch_size - ramp.start) % ramp.increment:
        raise ValueError(
            f"schedule.batch_ramp.increment={ramp.increment} does not divide the growth from "
            f"{ramp.start} to schedule.batch_size={config.batch_size}; choose a divisor of "
            f"{config.batch_size - ramp.start}"
        )


def _check_changes(config: ScheduleConfig) -> None:
    for name in ("learning_rate", "mtp_loss_weight", "bias_update_speed"):
        key, change = f"schedule.changes.{name}", getattr(config.changes, name)
        rising = all(a < b for a, b in pairwise((-1, *change.steps, config.steps)))
        if len(change.steps) != len(change.values) or not rising:
            raise ValueError(
                f"{key}.steps={change.steps} must rise from 0 to at most {config.steps - 1} "
                f"(schedule.steps={config.steps}) and have one value each, but "
                f"{key}.values={change.values}"
            )
        if any(value < 0 for value in change.values):
            raise ValueError(f"{key}.values={change.values} must not be negative")
