"""8-bit moments: what is stored, what a checkpoint sees of it, and what comes back."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.train.tiny import tiny_run
from train.config import check_run
from train.optimizer.config import OptimizerConfig
from train.optimizer.moments import Moments, build_format
from train.optimizer.quantised_moments import BLOCK, QuantisedMoments

NAMES = ("exp_avg", "exp_avg_sq")


@pytest.fixture
def quantised() -> QuantisedMoments:
    found = build_format(Moments.int8)
    assert isinstance(found, QuantisedMoments)
    return found


def values_of(name: str, kind: str, length: int = 3 * BLOCK + 77) -> Tensor:
    """Values over many magnitudes, whose blocks are led by positive, negative or no values."""
    magnitudes = 10.0 ** torch.randint(-12, 1, (length,))
    values = torch.randn(length) * magnitudes
    if name == "exp_avg_sq":
        values = values.square()
    elif kind == "led by a negative value":
        values[::BLOCK] = -100.0
    elif kind == "led by a positive value":
        values[::BLOCK] = 100.0
    if kind == "zeros":
        values.zero_()
    if kind == "some blocks zero":
        values[:BLOCK] = 0
    if kind == "subnormal":
        values *= 1e-38
    return values


def stored(quantised: QuantisedMoments, name: str, values: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = {}
    quantised.start(state, name, values)
    quantised.write(state, name, slice(0, len(values)), values)
    return state


KINDS = (
    "any",
    "led by a negative value",
    "led by a positive value",
    "zeros",
    "some blocks zero",
    "subnormal",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_checkpoint_holds_comes_back_bit_for_bit(
    quantised: QuantisedMoments, name: str, kind: str
) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        state = stored(quantised, name, values_of(name, kind))
        saved = quantised.open(state, name).clone()
        again: dict[str, Any] = {}
        quantised.start(again, name, saved)
        quantised.open(again, name).copy_(saved)
        quantised.close(again, name)
        assert torch.equal(quantised.open(again, name), saved)


@pytest.mark.parametrize("name", NAMES)
def test_another_cut_loads_within_the_quantisers_error(
    quantised: QuantisedMoments, name: str
) -> None:
    """A flat part that begins elsewhere has other blocks, hence other scales."""
    values = values_of(name, "any")
    saved = quantised.open(stored(quantised, name, values), name)[100:]
    again: dict[str, Any] = {}
    quantised.start(again, name, saved)
    quantised.open(again, name).copy_(saved)
    quantised.close(again, name)
    error = (quantised.open(again, name) - saved).abs()
    largest = torch.stack([block.abs().max() for block in saved.split(BLOCK)])
    limits = largest.repeat_interleave(BLOCK)[: len(saved)]
    assert (error <= 0.01 * limits).all()


def test_a_small_second_moment_is_rounded_up_and_not_to_zero(quantised: QuantisedMoments) -> None:
    values = torch.full((BLOCK,), 1e-12)
    values[0] = 1.0
    back = quantised.open(stored(quantised, "exp_avg_sq", values), "exp_avg_sq")
    assert back[0] == 1.0
    assert (back[1:] > 0).all()


def test_without_the_library_the_start_says_how_to_get_it(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, optimizer=OptimizerConfig(moments=Moments.int8))
    check_run(config, num_ranks=1)
    message = r"optimizer.moments=int8 needs bitsandbytes.*pip install 'bitsandbytes>=0.50'"
    with (
        mock.patch("train.optimizer.config.HAS_LIBRARY", False),
        pytest.raises(ValueError, match=message),
    ):
        check_run(config, num_ranks=1)
