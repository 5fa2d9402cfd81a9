"""What every ZeRO stage does for the engine, whoever keeps the masters and moments."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class StepResult(NamedTuple):
    is_applied: bool  # False where gradients were not finite and the step was skipped
    grad_norm: float  # before clipping; over all parameters and experts of all ranks


class Stretch(NamedTuple):
    """Consecutive elements of one of this rank's parameters, and what the rank keeps of them."""

    name: str
    start: int  # place of the first in the flattened parameter
    #: 1-D, live storage: `weight` (the master) and the optimizer's moments; or `gradient`.
    states: dict[str, Tensor]


class Sharding(Protocol):
    """`train/engine/replicated.py` is ZeRO 0, `train/engine/sharded.py` DeepSpeed's ZeRO 1 to 3."""

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        """The model's output for this rank's micro-batch."""

    def backward(self, share_of_loss: Tensor, *, is_last: bool) -> None:
        """Accumulate gradients; on the step's last call, add them up over ranks."""

    def step(self, lr: float) -> StepResult:
        """Clip and update, or skip the step if a gradient anywhere is not finite."""

    def masters(self) -> list[Tensor]:
        """The fp32 tensors of this rank that the optimizer updates."""

    def stretches(self) -> Iterator[Stretch]:
        """All that this rank owns; every element of a parameter is owned by one of its ranks."""

    def gradients(self) -> Iterator[Stretch]:
        """Between the last `backward` and `step`: reduced, unclipped, owned as the stretches."""

    def take_over(self) -> None:
        """Bring copies and the model's weights in line with the stretches, which were filled."""
