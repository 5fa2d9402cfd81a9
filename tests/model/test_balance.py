import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.balance import (
    count_load,
    group_balance_losses,
    max_violation,
    sequence_balance_loss,
    step_bias,
)


def _balance_loss_by_loops(
    scores: list[list[list[float]]], chosen: list[list[list[int]]], counted: list[list[bool]]
) -> float:
    """arXiv:2412.19437, equations 17 to 20, sum by sum."""
    loss = 0.0
    for row_scores, row_chosen, row_counted in zip(scores, chosen, counted, strict=True):
        kept = [t for t, is_counted in enumerate(row_counted) if is_counted]
        if not kept:
            continue
        num_experts, top_k = len(row_scores[0]), len(row_chosen[0])
        for expert in range(num_experts):
            hits = sum(expert in row_chosen[t] for t in kept)
            frequency = num_experts / (top_k * len(kept)) * hits
            share = sum(row_scores[t][expert] / sum(row_scores[t]) for t in kept) / len(kept)
            loss += frequency * share
    return loss


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 6), st.integers(1, 2), st.lists(st.booleans(), min_size=10, max_size=10))
def test_balance_loss_and_load_equal_the_formula_in_loops(
    num_experts: int, top_k: int, is_counted: list[bool]
) -> None:
    scores = torch.rand(2, 5, num_experts, generator=torch.Generator().manual_seed(num_experts))
    expert_ids = scores.topk(top_k, dim=-1).indices
    counted = torch.tensor(is_counted).view(2, 5)
    loss = sequence_balance_loss(scores, expert_ids, counted)
    wanted = _balance_loss_by_loops(scores.tolist(), expert_ids.tolist(), counted.tolist())
    assert loss.item() == pytest.approx(wanted, rel=1e-5)

    load = count_load(expert_ids, counted, num_experts=num_experts)
    choices = expert_ids[counted].flatten().tolist()
    assert load.tolist() == [choices.count(e) for e in range(num_experts)]


def _group_losses_by_loops(
    scores: list[list[list[float]]],
    chosen: list[list[list[int]]],
    counted: list[list[bool]],
    *,
    devices: list[list[int]],
    max_devices: int,
) -> list[float]:
    """arXiv:2405.04434, equations 26 to 31, sum by sum; a device is a list of experts."""
    device_loss = communication_loss = 0.0
    for row_scores, row_chosen, row_counted in zip(scores, chosen, counted, strict=True):
        kept = [t for t, is_counted in enumerate(row_counted) if is_counted]
        if not kept:
            continue
        num_experts, top_k = len(row_scores[0]), len(row_chosen[0])
        for device in devices:
            frequencies, affinity = [], 0.0
            for expert in device:
                hits = sum(expert in row_chosen[t] for t in kept)
                frequencies.append(num_experts / (top_k * len(kept)) * hits)
                affinity += sum(row_scores[t][expert] for t in kept) / len(kept)
            device_loss += sum(frequencies) / len(device) * affinity
            sent = sum(not set(device).isdisjoint(row_chosen[t]) for t in kept)
            communication_loss += len(devices) / (max_devices * len(kept)) * sent * affinity
    return [device_loss, communication_loss]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_groups=st.integers(1, 4),
    group_size=st.integers(1, 3),
    top_k=st.integers(1, 3),
    top_groups=st.integers(1, 4),
    is_counted=st.lists(st.booleans(), min_size=10, max_size=10),
)
def test_group_balance_losses_equal_the_formulas_in_loops(
    num_groups: int, group_size: int, top_k: int, top_groups: int, is_counted: list[bool]
) -> None:
    num_experts = num_groups * group_size
    generator = torch.Generator().manual_seed(num_experts)
    scores = torch.randn(2, 5, num_experts, generator=generator).softmax(dim=-1)
    expert_ids = scores.topk(min(top_k, num_experts), dim=-1).indices
    counted = torch.tensor(is_counted).view(2, 5)
    losses = group_balance_losses(
        scores, expert_ids, counted, num_groups=num_groups, top_groups=top_groups
    )
    wanted = _group_losses_by_loops(
        scores.tolist(),
        expert_ids.tolist(),
        counted.tolist(),
        devices=torch.arange(num_experts).view(num_groups, group_size).tolist(),
        max_devices=top_groups,
    )
    assert losses.tolist() == pytest.approx(wanted, rel=1e-5)


def test_perfectly_balanced_groups_cost_one() -> None:
    scores = torch.full((1, 4, 8), 1 / 8)
    expert_ids = torch.tensor([[[0, 2], [4, 6], [1, 3], [5, 7]]])  # each token visits 2 groups of 4
    counted = torch.ones(1, 4, dtype=torch.bool)
    losses = group_balance_losses(scores, expert_ids, counted, num_groups=4, top_groups=2)
    assert losses.tolist() == pytest.approx([1.0, 1.0])
    crowded = group_balance_losses(
        scores, expert_ids % 4, counted, num_groups=4, top_groups=2
    )  # equal scores: the sum of P is 1 whatever the choices
    assert crowded.tolist() == pytest.approx([1.0, 1.0])


def test_the_group_losses_push_scores_away_from_the_crowded_group() -> None:
    scores = torch.full((1, 4, 8), 1 / 8, requires_grad=True)
    expert_ids = torch.tensor([0, 1]).expand(1, 4, 2)  # group 0 has everything
    counted = torch.ones(1, 4, dtype=torch.bool)
    for loss in group_balance_losses(scores, expert_ids, counted, num_groups=4, top_groups=2):
        (grad,) = torch.autograd.grad(loss, scores, retain_graph=True)
        assert grad[..., :2].min() > grad[..., 2:].max()


def test_a_perfectly_balanced_sequence_costs_one() -> None:
    scores = torch.full((1, 4, 4), 0.5)
    expert_ids = torch.arange(4).view(1, 4, 1)
    counted = torch.ones(1, 4, dtype=torch.bool)
    assert sequence_balance_loss(scores, expert_ids, counted).item() == pytest.approx(1.0)


def test_padding_changes_neither_loss_nor_gradient() -> None:
    scores = torch.rand(1, 6, 4)
    short = scores[:, :4].clone().requires_grad_()
    padded = scores.clone().requires_grad_()
    counted = torch.arange(6).view(1, 6) < 4
    expert_ids = scores.topk(2, dim=-1).indices
    loss = sequence_balance_loss(short, expert_ids[:, :4], counted[:, :4])
    padded_loss = sequence_balance_loss(padded, expert_ids, counted)
    torch.testing.assert_close(padded_loss, loss)
    loss.backward()
    padded_loss.backward()
    assert short.grad is not None
    assert padded.grad is not None
    torch.testing.assert_close(padded.grad[:, :4], short.grad)
    assert not padded.grad[:, 4:].any()


def test_bias_moves_by_its_speed_against_the_load() -> None:
    bias = torch.tensor([[0.5, 0.0, -0.5], [0.0, 0.0, 0.0]])
    step_bias(bias, torch.tensor([[1, 2, 3], [0, 0, 6]]), speed=0.25)
    assert bias.tolist() == [[0.75, 0.0, -0.75], [0.25, 0.25, -0.25]]


def test_a_load_one_above_the_mean_moves_the_bias_whatever_the_counts() -> None:
    mean = 2**55  # fp32 and fp64 round one away here
    load = torch.tensor([mean + 1, mean, mean - 1])
    bias = torch.zeros(3)
    step_bias(bias, load, speed=1.0)
    assert bias.tolist() == [-1.0, 0.0, 1.0]


def test_max_violation_is_the_relative_excess_of_the_busiest() -> None:
    load = torch.tensor([[4, 4], [8, 0], [6, 2], [0, 0]])
    assert max_violation(load).tolist() == [0.0, 1.0, 0.5, 0.0]
