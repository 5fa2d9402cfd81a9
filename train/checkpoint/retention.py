"""Which checkpoints go once a new one is whole: a rule over steps and validation losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(slots=True, frozen=True, kw_only=True)
class Retention:
    """What is kept: the union of three sets. The newest is always in it."""

    newest: int  # that many
    every: int | None = None  # steps that are multiples of it, for good
    best: int = 0  # that many of the lowest validation loss


class Saved(NamedTuple):
    step: int
    loss: float | None  # of the validation split at this step; None where it was not measured


def choose_doomed(saved: Sequence[Saved], rule: Retention) -> list[int]:
    """The steps that no part of the rule keeps."""
    assert rule.newest >= 1, "check_checkpoint asks for it: the last good one stays"
    steps = sorted(one.step for one in saved)
    kept = set(steps[-rule.newest :])
    if rule.every is not None:
        kept |= {step for step in steps if step % rule.every == 0}
    measured = [(one.loss, one.step) for one in saved if one.loss is not None]
    kept |= {step for _, step in sorted(measured)[: rule.best]}
    return [step for step in steps if step not in kept]
