"""The drift monitor: whether a layer's products in FP8 still say what they would without it.

Every so many steps one layer's output is compared with what its weights and inputs give in the
numbers that surround it. A layer that is too far off, or no number where it would be one, computes
without FP8 from then on, and the run's record says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.products import Products, product_layers, use_fp8
from train.progress import Progress
from train.ranks import Ranks


@dataclass(slots=True, kw_only=True)
class DriftConfig:
    #: Steps between two comparisons; each takes the next of the layers that multiply in FP8. 0
    #: compares none.
    every: int = 50
    #: Largest norm of the difference, relative to the output's, with which a layer stays in FP8. A
    #: product is usually off by .04, a SwiGLU by .07.
    limit: float = 0.15


def check_drift(config: DriftConfig) -> None:
    """Refuse, with a ValueError, what can't be compared."""
    if config.every < 0:
        raise ValueError(
            f"precision.drift.every={config.every} must not be negative; 0 turns it off"
        )
    if config.limit <= 0:
        raise ValueError(
            f"precision.drift.limit={config.limit} would keep no layer in FP8; choose e.g. 0.15, "
            "or precision=bf16"
        )


class Drift(NamedTuple):
    """How far a layer in FP8 is off, over all ranks. Infinite: not a number, but in FP8 alone."""

    layer: str
    difference: float


class DriftMonitor:
    """Watches the layers of this rank's part of the model; all ranks judge together.

    The layers that no longer multiply in FP8 are kept in `progress.without_fp8`.
    """

    def __init__(
        self, config: DriftConfig, model: nn.Module, progress: Progress, ranks: Ranks
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._layers = {name: at for name, at in product_layers(model).items() if at.is_fp8}
        everyones = ranks.gather(list(self._layers))
        self._names = sorted({name for names in everyones for name in names})
        self._measured: dict[str, Tensor] = {}
        self._is_watching = False
        if self._names:
            use_fp8(model, but=progress.without_fp8)

    def watch(self, progress: Progress) -> None:
        """Before a step: if it is a comparison's turn, listen to the layer whose turn it is.

        After a step whose gradients were not finite, to all of them.
        """
        in_fp8 = [name for name in self._names if name not in progress.without_fp8]
        self._is_watching = bool(in_fp8) and self._config.every > 0
        if not self._is_watching:
            return
        if progress.skipped_in_a_row == 0:
            turn, rest = divmod(progress.step, self._config.every)
            self._is_watching = rest == 0
            in_fp8 = in_fp8[turn % len(in_fp8) :][:1]
        if self._is_watching:
            for name in in_fp8:
                if name in self._layers:
                    compare_once(self._layers[name], partial(self._measured.__setitem__, name))

    def judge(self, progress: Progress) -> list[Drift]:
        """After the step: what was measured. Layers that drift too far have left FP8."""
        if not self._is_watching:
            return []
        here = {name: difference.item() for name, difference in self._measured.items()}
        self._measured.clear()
        over_ranks: dict[str, float] = {}
        for measured in self._ranks.gather(here):
            for name, difference in measured.items():
                over_ranks[name] = max(over_ranks.get(name, 0.0), difference)
        drifts = [Drift(name, difference) for name, difference in sorted(over_ranks.items())]
        for name in (drift.layer for drift in drifts if self.is_too_far(drift)):
            progress.without_fp8.append(name)
            if name in self._layers:
                self._layers[name].is_fp8 = False
        return drifts

    def is_too_far(self, drift: Drift) -> bool:
        """Whether the layer must compute without FP8."""
        return drift.difference > self._config.limit


def compare_once(layer: Products, note: Callable[[Tensor], None]) -> None:
    """Give `note` the layer's drift, as a tensor on its device, in its next forward pass."""

    def compare(_layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        handle.remove()
        layer.is_fp8 = False
        try:
            with torch.no_grad():
                note(difference(output, layer(*inputs)))
        finally:
            layer.is_fp8 = True

    handle = layer.register_forward_hook(compare)


def difference(in_fp8: Tensor, without: Tensor) -> Tensor:
    """Norm of the difference relative to `without`'s. Infinite if only `in_fp8` is not finite;
    0 if neither is, for which FP8 is not to blame."""
    in_fp8, without = in_fp8.detach().double(), without.double()  # squares of fp32 overflow it
    off = (in_fp8 - without).norm() / without.norm().clamp(min=torch.finfo(torch.float32).tiny)
    off = torch.where(in_fp8.isfinite().all(), off, math.inf)
    return torch.where(without.isfinite().all(), off, 0.0)
