"""AdamW: fp32 arithmetic over moments in fp32 or BF16, on whole tensors and flat parts alike."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.train.tiny import tiny_run
from train.config import check_run
from train.optimizer.adamw import AdamW
from train.optimizer.config import OptimizerConfig
from train.optimizer.moments import SLOWEST_IN_BF16, Moments
from train.optimizer.quantised_moments import BLOCK

SIZE = 100 * BLOCK
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in ((7, 50), (301,), (3, 4, 5))]


def train(optimizer: torch.optim.Optimizer, steps: int = 5) -> list[Tensor]:
    """The parameters after steps on gradients that depend on the step alone."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in trained:
            scale = 10.0 ** torch.randint(-4, 1, parameter.shape, generator=generator)
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
        optimizer.step()
    return [parameter.detach() for parameter in trained]


def small_stretches() -> Any:
    """Several stretches in each tensor."""
    return mock.patch.dict("train.optimizer.moments.STRETCH", cpu=64)


def assert_same(got: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_with_fp32_moments_it_is_torchs_own_bit_for_bit() -> None:
    expected = train(torch.optim.AdamW(parameters(), fused=True, **SETTINGS))
    assert_same(train(AdamW(parameters(), **SETTINGS)), expected)
    with small_stretches():
        assert_same(train(AdamW(parameters(), **SETTINGS)), expected)


def test_with_bf16_moments_it_is_fp32_arithmetic_on_rounded_moments() -> None:
    """The reference rounds torch's own fp32 moments after each of its steps."""
    reference = torch.optim.AdamW(parameters(), fused=True, **SETTINGS)

    def round_moments(*_: Any) -> None:
        for state in reference.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(state[name].bfloat16())

    reference.register_step_post_hook(round_moments)
    expected = train(reference)
    with small_stretches():
        optimizer = AdamW(parameters(), moments=Moments.bf16, **SETTINGS)
        assert_same(train(optimizer), expected)
    for mine, theirs in zip(optimizer.state.values(), reference.state.values(), strict=True):
        assert torch.equal(mine["exp_avg_sq"].float(), theirs["exp_avg_sq"])


def test_a_flat_part_of_several_parameters_steps_like_the_parameters() -> None:
    flat = nn.Parameter(torch.cat([parameter.detach().view(-1) for parameter in parameters()]))
    whole = AdamW(parameters(), moments=Moments.bf16, **SETTINGS)
    parts = AdamW([flat], moments=Moments.bf16, **SETTINGS)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        flat.grad = torch.randn(flat.shape, generator=generator)
        grads = flat.grad.split([p.numel() for p in parameters()])
        for parameter, grad in zip(whole.param_groups[0]["params"], grads, strict=True):
            parameter.grad = grad.view_as(parameter)
        whole.step()
        parts.step()
    together = torch.cat([p.detach().view(-1) for p in whole.param_groups[0]["params"]])
    assert torch.equal(flat.detach(), together)


def test_with_8_bit_moments_it_stays_near_fp32() -> None:
    """Weights move by lr per step; a tenth of the way walked is what the quantiser may cost."""
    steps = 5
    expected = train(AdamW(parameters(), **SETTINGS), steps)
    got = train(AdamW(parameters(), moments=Moments.int8, **SETTINGS), steps)
    for one, other in zip(got, expected, strict=True):
        assert not torch.equal(one, other)
        assert (one - other).abs().mean() < 0.1 * steps * SETTINGS["lr"]
        assert (one - other).abs().max() < steps * SETTINGS["lr"]


@pytest.mark.parametrize(
    ("moments", "bytes_each"),
    [(Moments.fp32, 8.0), (Moments.bf16, 4.0), (Moments.int8, 2 + 2 * 4 / BLOCK)],
)
def test_bytes_per_parameter_of_the_moments(moments: Moments, bytes_each: float) -> None:
    optimizer = AdamW([nn.Parameter(torch.zeros(SIZE))], moments=moments)
    train(optimizer, steps=1)
    (state,) = optimizer.state.values()
    kept = sum(value.nbytes for name, value in state.items() if name != "step")
    assert kept / SIZE == bytes_each


def test_a_parameter_without_gradient_keeps_its_value_and_moments() -> None:
    used, unused = parameters()[:2]
    before = unused.detach().clone()
    optimizer = AdamW([used, unused], **SETTINGS)
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(unused.detach(), before)
    assert not optimizer.state[unused]


@pytest.mark.parametrize("beta", ["beta1", "beta2"])
def test_a_decay_that_bf16_would_round_away_is_refused(tmp_path: Path, beta: str) -> None:
    changes: Any = {beta: 0.999}
    config = tiny_run(tmp_path, optimizer=OptimizerConfig(moments=Moments.bf16, **changes))
    message = rf"optimizer.{beta}=0.999 is too slow for optimizer.moments=bf16.*at most 0.996"
    with pytest.raises(ValueError, match=message):
        check_run(config, num_ranks=1)


@pytest.mark.parametrize(("beta", "is_stuck"), [(SLOWEST_IN_BF16, False), (0.999, True)])
def test_a_bf16_moment_decays_up_to_the_slowest_rate_and_not_beyond(
    beta: float, is_stuck: bool
) -> None:
    """The rule's reason: without gradients a moment must shrink from wherever it stands."""
    mantissas = 1 + torch.arange(128, dtype=torch.float32) / 128  # every BF16 in [1, 2)
    shrunk = (mantissas * beta).bfloat16().float()
    assert bool((shrunk == mantissas).any()) is is_stuck
