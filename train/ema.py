"""A moving average of the weights, kept on the host: often better than the weights themselves.

Each rank averages the pieces that it owns, so the average is in a checkpoint as everything else is:
logical tensors `ema/...`, in files of their own, fit for any layout.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from train.checkpoint.manifest import Fragment, Manifest

WEIGHT, EMA_KIND = "weight/", "ema/"


class Weights(StrEnum):
    """Which of a checkpoint's weights are meant."""

    trained = "trained"  # those that training goes on from
    ema = "ema"  # their average


@dataclass(slots=True, kw_only=True)
class EMAConfig:
    #: Share of the average that is kept at each update of the weights (.999, say); null keeps none.
    decay: float | None = None
    #: Updates between two of the average, which then keeps `decay` to the power of that many:
    #: each copies the rank's share of the master weights to the host.
    every: int = 1


def check_ema(config: EMAConfig) -> None:
    """Refuse, with a ValueError, a rate that makes no average."""
    if config.decay is not None and not 0 <= config.decay < 1:
        raise ValueError(f"ema.decay={config.decay} must lie in [0, 1), or be null for no average")
    if config.every < 1:
        raise ValueError(f"ema.every={config.every} must be at least 1")


class EMA:
    """average = decay * average + (1 - decay) * weights, in fp32, from the weights on."""

    def __init__(self, config: EMAConfig, fragments: Iterable[Fragment]) -> None:
        self._config = config
        self._average: list[Fragment] = []
        if config.decay is not None:
            self._average = [
                one._replace(name=ema_name(one.name), data=_to_host(one.data, is_copy=True))
                for one in _weights(fragments)
            ]

    def fragments(self) -> list[Fragment]:
        """The average as live storage; nothing where none is kept."""
        return self._average

    @torch.no_grad()
    def update(self, fragments: Iterable[Fragment], *, updates: int) -> None:
        """Take in the weights after so many updates of the run, if it is the average's turn."""
        if self._config.decay is None or updates % self._config.every:
            return
        share = 1.0 - self._config.decay**self._config.every
        for mine, weight in zip(self._average, _weights(fragments), strict=True):
            mine.data.lerp_(_to_host(weight.data), share)

    @torch.no_grad()
    def restart(self, fragments: Iterable[Fragment]) -> None:
        """Begin anew from the weights as they are."""
        if self._average:
            for mine, weight in zip(self._average, _weights(fragments), strict=True):
                mine.data.copy_(weight.data)


def ema_name(name: str) -> str:
    """The average's logical name for that of a weight; a buffer's stays."""
    return name.replace(WEIGHT, EMA_KIND, 1) if is_weight(name) else name


def stored_name(name: str, weights: Weights) -> str:
    """The name under which a checkpoint has that weight (or buffer, of which there is one)."""
    return ema_name(name) if weights is Weights.ema else name


def check_average(manifest: Manifest, weights: Weights) -> None:
    """Refuse, with a ValueError, to take an average from a checkpoint that has none."""
    if weights is Weights.ema and not any(map(is_average, manifest.tensors)):
        raise ValueError(
            f"weights=ema, but the checkpoint of step {manifest.step} holds no average: its run "
            "had ema.decay=null; choose weights=trained, or a step that was saved with one"
        )


def is_weight(name: str) -> bool:
    return name.startswith(WEIGHT)


def is_average(name: str) -> bool:
    return name.startswith(EMA_KIND)


def _weights(fragments: Iterable[Fragment]) -> Iterable[Fragment]:
    return (fragment for fragment in fragments if is_weight(fragment.name))


def _to_host(data: Tensor, *, is_copy: bool = False) -> Tensor:
    return data.detach().to("cpu", torch.float32, copy=is_copy)
