import math

import pytest
import torch
import torch.distributed as dist

from model.init import first_experts, initialise
from model.transformer import Transformer
from tests.model.small import small_config
from tests.ranks import ranks


def _initialised(*, seed: int = 0, expert_group: dist.ProcessGroup | None = None) -> Transformer:
    model = Transformer(small_config(mtp_depth=1), expert_group=expert_group)
    initialise(model, seed=seed, std=0.5)
    return model


@ranks(2)
def test_initial_weights_do_not_depend_on_where_experts_live() -> None:
    local = dict(_initialised().named_parameters())
    spread = _initialised(expert_group=dist.group.WORLD)
    firsts = first_experts(spread)
    assert set(firsts.values()) == {4 * dist.get_rank()}
    for name, parameter in spread.named_parameters():
        wanted = local[name]
        if name in firsts:
            wanted = wanted[firsts[name] : firsts[name] + 4]
        assert torch.equal(parameter, wanted), name


def test_no_two_tensors_or_experts_start_alike() -> None:
    values = []
    for parameter in _initialised().parameters():
        values += list(parameter) if parameter.ndim == 3 else [parameter]
    starts = {round(value.flatten()[0].item(), 6) for value in values if value.ndim > 1}
    assert len(starts) == sum(value.ndim > 1 for value in values)


def test_the_seed_alone_decides() -> None:
    assert torch.equal(_initialised().head.weight, _initialised().head.weight)
    assert not torch.equal(_initialised(seed=1).head.weight, _initialised().head.weight)


def test_matrices_are_normal_and_gains_one() -> None:
    for name, parameter in _initialised().named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            tolerance = 5 * 0.5 / math.sqrt(parameter.numel())
            assert parameter.mean().item() == pytest.approx(0.0, abs=tolerance), name
            assert parameter.std().item() == pytest.approx(0.5, abs=tolerance), name


def test_biases_start_at_zero() -> None:
    assert not any(buffer.any() for buffer in _initialised().buffers())
