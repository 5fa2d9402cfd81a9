from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.router import GroupScore, Router, RouterConfig, Score, check_router, route
from tests.model.small import small_config, small_model


@st.composite
def _choices(draw: st.DrawFn) -> tuple[RouterConfig, int, int]:
    """A router's config, its number of experts and top_k."""
    group_size = draw(st.integers(2, 4))
    num_groups = draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, num_groups))
    config = RouterConfig(
        score=draw(st.sampled_from(Score)),
        renormalise=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from(GroupScore)),
        bias=draw(st.booleans()),
    )
    return config, num_groups * group_size, draw(st.integers(1, top_groups * group_size))


def _choose(scores: list[float], bias: list[float], config: RouterConfig, top_k: int) -> set[int]:
    """One token's experts, by sorting."""
    choice = [s + b * config.bias for s, b in zip(scores, bias, strict=True)]
    size = len(choice) // config.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.num_groups)]
    best_of_group = 1 if config.group_score is GroupScore.max else 2

    def group_score(group: list[int]) -> float:
        return sum(sorted((choice[e] for e in group), reverse=True)[:best_of_group])

    open_groups = sorted(groups, key=group_score, reverse=True)[: config.top_groups]
    experts = sorted(chain(*open_groups), key=lambda e: choice[e], reverse=True)
    return set(experts[:top_k])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_choices(), st.integers(0, 2**31))
def test_route_equals_sorting_each_token(sizes: tuple[RouterConfig, int, int], seed: int) -> None:
    config, num_experts, top_k = sizes
    check_router(config, num_experts=num_experts, top_k=top_k)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(7, num_experts, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_experts, generator=generator, dtype=torch.float64)
    routing = route(scores, bias, config=config, top_k=top_k)

    for token in range(7):
        wanted = _choose(scores[token].tolist(), bias.tolist(), config, top_k)
        assert set(routing.expert_ids[token].tolist()) == wanted
        total = sum(scores[token, e].item() for e in wanted) if config.renormalise else 1.0
        for expert, weight in zip(routing.expert_ids[token], routing.weights[token], strict=True):
            assert weight.item() == pytest.approx(
                scores[token, expert].item() / total * config.scale
            )


def test_the_bias_moves_the_choice_but_not_the_weights_gradient() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1]], requires_grad=True)
    bias = torch.tensor([-1.0, 0.0, 0.0])
    routing = route(scores, bias, config=RouterConfig(renormalise=False), top_k=2)
    assert set(routing.expert_ids[0].tolist()) == {1, 2}
    routing.weights.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.0, 1.0, 1.0]]


def test_scores_of_zero_give_weights_of_zero() -> None:
    routing = route(torch.zeros(2, 4), torch.zeros(4), config=RouterConfig(), top_k=2)
    assert torch.equal(routing.weights, torch.zeros(2, 2))


@pytest.mark.parametrize("score", Score)
def test_router_scores_in_fp32_under_bf16_inputs(score: Score) -> None:
    router = Router(RouterConfig(score=score), dim=8, num_experts=6, top_k=2)
    nn.init.normal_(router.weight)
    router.bfloat16()
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    logits = x.double() @ router.weight.double().t()
    wanted = logits.sigmoid() if score is Score.sigmoid else logits.softmax(-1)
    routing = router(x)
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.scores.double(), wanted, rtol=1e-5, atol=1e-6)


def _bfloat16(module: nn.Module) -> nn.Module:
    return module.bfloat16()


def _half(module: nn.Module) -> nn.Module:
    return module.half()


def _to_bfloat16(module: nn.Module) -> nn.Module:
    return module.to(torch.bfloat16)


@pytest.mark.parametrize("cast", [_bfloat16, _half, _to_bfloat16])
@pytest.mark.parametrize("inside_a_model", [False, True])
def test_no_cast_rounds_the_bias(cast: object, inside_a_model: bool) -> None:
    config = small_config()
    if inside_a_model:
        module: nn.Module = small_model(config)
        (router,) = module.routers().values()
    else:
        module = router = Router(config.moe.router, dim=16, num_experts=8, top_k=3)
    unrounded = torch.full((8,), 1 / 3)
    router.bias.copy_(unrounded)
    cast(module)  # type: ignore[operator]
    assert router.weight.dtype != torch.float32
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, unrounded)
    assert router.bias is dict(router.named_buffers())["bias"]


REFUSED: list[tuple[dict[str, object], int, str]] = [
    ({}, 9, r"model\.moe\.top_k=9 exceeds model\.moe\.num_experts=8; choose top_k <= num_experts"),
    ({}, 0, r"model\.moe\.top_k=0 must be positive"),
    ({"num_groups": 3}, 2, r"num_groups=3 does not divide model\.moe\.num_experts=8"),
    ({"num_groups": 4, "top_groups": 5}, 2, r"top_groups=5 must lie between 1 and .*num_groups=4"),
    ({"num_groups": 4, "top_groups": 1}, 3, r"top_k=3 exceeds the 2 experts in .*top_groups=1"),
    ({"num_groups": 8, "top_groups": 4}, 2, r"group_score=top2_sum needs groups of at least 2"),
    ({"bias_update_speed": -1.0}, 2, r"bias_update_speed=-1\.0"),
]


@pytest.mark.parametrize(("fields", "top_k", "message"), REFUSED)
def test_impossible_choices_are_refused(
    fields: dict[str, object], top_k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_router(replace(RouterConfig(), **fields), num_experts=8, top_k=top_k)


def test_without_bias_the_best_score_wins() -> None:
    router = Router(RouterConfig(bias=False), dim=4, num_experts=4, top_k=1)
    nn.init.normal_(router.weight)
    router.bias[0] = 100.0
    routing = router(torch.randn(9, 4))
    assert torch.equal(routing.expert_ids[:, 0], routing.scores.argmax(dim=-1))
