"""The router's choice in one pass: groups, bias, top-k, weights; and the gradient of its scores.

T tokens, E experts, G groups, K choices per token. Scores are fp32.
"""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TAKEN = tl.constexpr(-(2**31))  # below every number's place in the order


class Rule(NamedTuple):
    """What of `model.router.RouterConfig` decides a choice."""

    top_k: int
    num_groups: int
    top_groups: int
    is_group_max: bool  # else a group is as good as its best two together
    is_renormalised: bool
    scale: float


def choose(scores: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """Expert ids [T, K], int64, and weights [T, K]: those of `model.router.route`. Among equal
    scores the lowest id comes first; NaN, as in torch, before every number."""
    expert_ids, weights = _Choose.apply(scores, bias, rule)
    return expert_ids, weights


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
        scores = scores.contiguous()
        num_tokens, num_experts = scores.shape
        expert_ids = torch.empty(num_tokens, rule.top_k, dtype=torch.int64, device=scores.device)
        weights = torch.empty(num_tokens, rule.top_k, dtype=scores.dtype, device=scores.device)
        if num_tokens:
            _choose[(num_tokens,)](
                scores,
                scores if bias is None else bias,
                expert_ids,
                weights,
                num_experts,
                rule.scale,
                HAS_BIAS=bias is not None,
                K=rule.top_k,
                GROUPS=rule.num_groups,
                TOP_GROUPS=rule.top_groups,
                GROUP_SIZE=num_experts // rule.num_groups,
                IS_GROUP_MAX=rule.is_group_max,
                IS_RENORMALISED=rule.is_renormalised,
                EXPERTS=triton.next_power_of_2(num_experts),
                num_warps=1,
            )
        ctx.save_for_backward(scores, expert_ids)
        ctx.rule = rule
        ctx.mark_non_differentiable(expert_ids)
        return expert_ids, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor, None, None]:
        scores, expert_ids = ctx.saved_tensors
        num_tokens, num_experts = scores.shape
        grad_scores = torch.empty_like(scores)
        if num_tokens:
            _choose_backward[(num_tokens,)](
                grad.contiguous(),
                scores,
                expert_ids,
                grad_scores,
                num_experts,
                ctx.rule.scale,
                K=ctx.rule.top_k,
                IS_RENORMALISED=ctx.rule.is_renormalised,
                EXPERTS=triton.next_power_of_2(num_experts),
                num_warps=1,
            )
        return grad_scores, None, None


@triton.jit
@no_type_check
def _place_in_order(x):
    """An int32 for each fp32 that compares as the numbers do, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    place = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, place)


@triton.jit
@no_type_check
def _first_best(place, lane, EXPERTS: tl.constexpr):
    """The lowest lane whose place in the order is the highest."""
    return tl.min(tl.where(place == tl.max(place, axis=0), lane, EXPERTS), axis=0)


@triton.jit
@no_type_check
def _choose(
    scores_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    num_experts,
    scale,
    HAS_BIAS: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    IS_GROUP_MAX: tl.constexpr,
    IS_RENORMALISED: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, EXPERTS)
    is_expert = lane < num_experts
    score = tl.load(scores_ptr + token * num_experts + lane, mask=is_expert, other=0.0)
    choice = score
    if HAS_BIAS:
        choice = score + tl.load(bias_ptr + lane, mask=is_expert, other=0.0)
    place = tl.where(is_expert, _place_in_order(choice), TAKEN)
    if GROUPS > 1:
        group = lane // GROUP_SIZE
        of_group = place  # each lane's place in the order of groups
        for g in tl.static_range(GROUPS):
            own = tl.where(group == g, place, TAKEN)
            if IS_GROUP_MAX:
                of_group = tl.where(group == g, tl.max(own, axis=0), of_group)
            else:
                best = _first_best(own, lane, EXPERTS)
                second = _first_best(tl.where(lane == best, TAKEN, own), lane, EXPERTS)
                is_either = (lane == best) | (lane == second)
                both = tl.sum(tl.where(is_either, choice, 0.0), axis=0)
                of_group = tl.where(group == g, _place_in_order(both), of_group)
        of_group = tl.where(is_expert, of_group, TAKEN)
        is_open = lane < 0
        for _ in tl.static_range(TOP_GROUPS):
            best_group = _first_best(of_group, lane, EXPERTS) // GROUP_SIZE
            is_open = is_open | (group == best_group)
            of_group = tl.where(group == best_group, TAKEN, of_group)
        place = tl.where(is_open, place, TAKEN)  # the open ones are at least K (check_router)

    rank = tl.full((EXPERTS,), K, tl.int32)
    for k in tl.static_range(K):
        expert = _first_best(place, lane, EXPERTS)
        rank = tl.where(lane == expert, k, rank)
        place = tl.where(lane == expert, TAKEN, place)
    is_chosen = rank < K
    weight = score
    if IS_RENORMALISED:
        weight = score / (tl.sum(tl.where(is_chosen, score, 0.0), axis=0) + 1e-20)
    tl.store(ids_ptr + token * K + rank, lane.to(tl.int64), mask=is_chosen)
    tl.store(weights_ptr + token * K + rank, weight * scale, mask=is_chosen)


@triton.jit
@no_type_check
def _choose_backward(
    grad_ptr,
    scores_ptr,
    ids_ptr,
    grad_scores_ptr,
    num_experts,
    scale,
    K: tl.constexpr,
    IS_RENORMALISED: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Of w = scale s / sum s: ds = (scale dw - sum dw w) / sum s, and 0 for all not chosen."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, EXPERTS)
    is_expert = lane < num_experts
    score = tl.load(scores_ptr + token * num_experts + lane, mask=is_expert, other=0.0)
    slope = tl.zeros_like(score)
    is_chosen = lane < 0
    for k in tl.static_range(K):
        is_k = lane == tl.load(ids_ptr + token * K + k)
        slope = tl.where(is_k, tl.load(grad_ptr + token * K + k) * scale, slope)
        is_chosen = is_chosen | is_k
    if IS_RENORMALISED:
        total = tl.sum(tl.where(is_chosen, score, 0.0), axis=0) + 1e-20
        share = tl.sum(tl.where(is_chosen, slope * score, 0.0), axis=0) / total
        slope = tl.where(is_chosen, (slope - share) / total, 0.0)
    tl.store(grad_scores_ptr + token * num_experts + lane, slope, mask=is_expert)
