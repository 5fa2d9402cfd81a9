import math
from dataclasses import replace

import pytest
import torch

from model.rope import (
    RopeConfig,
    RopeScaling,
    check_rope,
    pair_frequencies,
    rotate_halves,
    rotate_pairs,
    rotation,
    softmax_temperature,
)

YARN = RopeConfig(scaling=RopeScaling.yarn, factor=40.0, original_seq_len=64)


def test_rotation_multiplies_each_pair_as_a_complex_number() -> None:
    config = RopeConfig(theta=100.0)
    x = torch.randn(2, 5, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    turned = rotate_pairs(x, rotation(config, positions, dim=8))
    for pair in range(4):
        angle = positions * 100.0 ** (-2 * pair / 8)
        wanted = torch.view_as_complex(x[..., 2 * pair : 2 * pair + 2].contiguous())
        wanted = wanted * torch.polar(torch.ones_like(angle), angle)[:, :, None]
        torch.testing.assert_close(turned[..., 2 * pair : 2 * pair + 2], torch.view_as_real(wanted))


def test_slices_at_odd_places_are_rotated_too() -> None:
    wide = torch.randn(2, 3, 1, 9)
    turn = rotation(RopeConfig(), torch.arange(3).expand(2, 3), dim=4)
    wanted = rotate_pairs(wide[..., 5:].clone(), turn)
    assert torch.equal(rotate_pairs(wide[..., 5:], turn), wanted)


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8)

    def score(query_place: int, key_place: int) -> torch.Tensor:
        turns = [
            rotation(RopeConfig(), torch.tensor([[place]]), dim=8)
            for place in (query_place, key_place)
        ]
        return (rotate_pairs(query, turns[0]) * rotate_pairs(key, turns[1])).sum()

    torch.testing.assert_close(score(17, 11), score(106, 100), rtol=1e-4, atol=1e-5)


def test_gradient_equals_autograd_through_the_definition() -> None:
    x = torch.randn(2, 4, 3, 6, requires_grad=True)
    turn = rotation(YARN, torch.arange(4).expand(2, 4), dim=6)
    upstream = torch.randn(2, 4, 3, 6)
    as_complex = torch.view_as_complex(x.unflatten(-1, (3, 2)))
    wanted = torch.view_as_real(as_complex * torch.complex(*turn)[:, :, None]).flatten(-2)
    (wanted_grad,) = torch.autograd.grad(wanted, x, upstream)
    (grad,) = torch.autograd.grad(rotate_pairs(x, turn), x, upstream)
    torch.testing.assert_close(grad, wanted_grad)


def test_bf16_is_rotated_in_fp32() -> None:
    x = torch.randn(1, 3, 2, 4).bfloat16()
    turn = rotation(RopeConfig(), torch.tensor([[0, 1000, 30_000]]), dim=4)
    turned = rotate_pairs(x, turn)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate_pairs(x.float(), turn).bfloat16())


def test_yarn_keeps_fast_pairs_and_divides_slow_ones_by_the_factor() -> None:
    dim = 32
    plain = pair_frequencies(RopeConfig(), dim=dim)
    scaled = pair_frequencies(YARN, dim=dim)
    turns = YARN.original_seq_len * plain / (2 * math.pi)
    ratio = plain / scaled
    assert torch.all(ratio[turns > 2 * YARN.beta_fast] == 1.0)
    slow = ratio[turns < YARN.beta_slow / 2]
    torch.testing.assert_close(slow, torch.full_like(slow, 40.0))
    assert torch.all(ratio[1:] >= ratio[:-1])


def test_yarns_temperature_moves_between_rotation_and_softmax() -> None:
    strong = 0.1 * math.log(40) + 1
    positions = torch.zeros(1, 1, dtype=torch.int64)
    both = replace(YARN, mscale=1.0, mscale_all_dim=1.0)
    assert rotation(YARN, positions, dim=4).cos[0, 0, 0].item() == pytest.approx(strong)
    assert softmax_temperature(YARN) == 1.0
    assert rotation(both, positions, dim=4).cos[0, 0, 0].item() == pytest.approx(1.0)
    assert softmax_temperature(both) == pytest.approx(strong**2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(YARN, factor=0.5), r"model\.rope\.factor=0\.5 shrinks the context"),
        (RopeConfig(factor=2.0), r"model\.rope\.factor=2\.0 has no effect with .*scaling=none"),
    ],
)
def test_settings_without_a_rotation_are_refused(config: RopeConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rope(config)


def test_halves_are_pairs_in_another_order() -> None:
    x = torch.randn(2, 5, 3, 8)
    turn = rotation(RopeConfig(), torch.arange(5).expand(2, 5), dim=8)
    paired = x.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)  # halves -> neighbours
    turned = rotate_pairs(paired, turn).unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(rotate_halves(x, turn), turned)


def test_linear_scaling_is_position_divided_by_the_factor() -> None:
    config = RopeConfig(scaling=RopeScaling.linear, factor=4.0)
    assert torch.equal(pair_frequencies(config, dim=8) * 4, pair_frequencies(RopeConfig(), dim=8))
