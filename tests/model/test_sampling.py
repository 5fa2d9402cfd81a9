"""What is drawn from given logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.sampling import SamplingConfig, check_sampling, draw

PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])


def draws(count: int, **settings: float | int | None) -> Tensor:
    """Tokens drawn from PROBABILITIES at evenly spread points of [0, 1)."""
    uniform = torch.arange(count, dtype=torch.float64) / count
    logits = PROBABILITIES.log().expand(count, -1)
    return draw(logits, uniform, SamplingConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    counts = draws(10_000, temperature=temperature, top_p=1.0).bincount(minlength=4)
    wanted = (PROBABILITIES.log() / temperature).softmax(dim=-1) * 10_000
    assert (counts - wanted).abs().max() <= 2


def test_without_temperature_the_likeliest_is_taken() -> None:
    assert set(draws(100, temperature=0.0).tolist()) == {1}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.7}, {1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_p": 1.0, "top_k": 1}, {1}),
        ({"top_p": 1.0, "top_k": 3}, {0, 1, 3}),
        ({"top_p": 1.0, "top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.62, "top_k": 2}, {1}),  # 0.5 / 0.8 is 0.625: top_p sees what top_k left
        ({"top_p": 0.63, "top_k": 2}, {1, 3}),
    ],
)
def test_only_the_likeliest_are_drawn(settings: dict[str, float], kept: set[int]) -> None:
    assert set(draws(1000, temperature=1.0, **settings).tolist()) == kept


@given(
    seed=st.integers(0, 2**31),
    uniform=st.floats(0, 1, exclude_max=True),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(1, 40),
)
def test_a_token_that_is_left_out_is_never_drawn(
    seed: int, uniform: float, top_p: float, top_k: int
) -> None:
    logits = 5 * torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    config = SamplingConfig(temperature=1.0, top_p=top_p, top_k=top_k)
    token = draw(logits, torch.tensor([uniform], dtype=torch.float64), config)
    ranks = logits[0].argsort(descending=True).tolist()
    rank = ranks.index(int(token))
    kept = logits[0, ranks[:top_k]].double().softmax(dim=-1)
    assert rank < top_k
    assert kept[:rank].sum() < top_p + 1e-12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_k": 0}, "top_k=0 must be at least 1, or null"),
    ],
)
def test_settings_that_draw_nothing_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampling(SamplingConfig(**settings))  # type: ignore[arg-type]
