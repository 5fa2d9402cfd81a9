"""The router: which experts a token visits and how much each counts.

T tokens, D model width, E experts, G groups of experts, K choices per token.
Sources: arXiv:2405.04434 (V2), arXiv:2412.19437 2.1.2 (V3), arXiv:2408.15664 (bias).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model.backends import Backend, choose_router
from model.recompute import rebuild


class Score(StrEnum):
    sigmoid = "sigmoid"
    softmax = "softmax"


class GroupScore(StrEnum):
    """A group is as good as its best expert (V2) or as its best two together (V3)."""

    max = "max"
    top2_sum = "top2_sum"


@dataclass(slots=True, kw_only=True)
class RouterConfig:
    #: Turns a token's affinity to each expert into a score.
    score: Score = Score.sigmoid
    #: Whether a token's chosen weights are divided by their sum.
    renormalise: bool = True
    #: Factor on all weights.
    scale: float = 1.0
    #: Equal groups the experts are divided into, in order; 1 means no groups.
    num_groups: int = 1
    #: Groups from which one token may choose.
    top_groups: int = 1
    #: What a group's score is.
    group_score: GroupScore = GroupScore.top2_sum
    #: Whether a bias, moved against each expert's load, joins the scores for the choice.
    bias: bool = True
    #: Step of that bias after each optimizer step; 0 freezes it.
    bias_update_speed: float = 0.001


class Routing(NamedTuple):
    """Where T tokens go. Scores are for the balance loss; they cover all experts."""

    expert_ids: Int64[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    scores: Float[Tensor, "T E"]


class Router(nn.Module):
    """Scores every expert in fp32 and keeps the best K, whatever precision surrounds it."""

    bias: Tensor

    def __init__(self, config: RouterConfig, *, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.config = config
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "T D"]) -> Routing:
        logits = F.linear(rebuild(Tensor.float, x), self.weight.float())
        is_sigmoid = self.config.score is Score.sigmoid
        scores = logits.sigmoid() if is_sigmoid else logits.softmax(dim=-1)
        return route(scores, self.bias, config=self.config, top_k=self.top_k)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Move the bias with the module, but never let a cast (`.bfloat16()`) round it."""
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            self.bias = bias.to(self.bias.device)
        return self


def route(
    scores: Float[Tensor, "T E"], bias: Float[Tensor, " E"], *, config: RouterConfig, top_k: int
) -> Routing:
    """The K best experts of each token and their weights.

    The bias steers the choice, never the weight (arXiv:2412.19437, 2.1.2).
    """
    if choose_router(scores.device).backend is Backend.triton:
        return Routing(*_route_in_one_pass(scores, bias, config, top_k), scores)
    choice = scores.detach()
    if config.bias:
        choice = choice + bias
    if config.num_groups > 1:
        choice = _keep_top_groups(choice, config)
    expert_ids = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, expert_ids)
    if config.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # all scores may be 0
    return Routing(expert_ids, weights * config.scale, scores)


def _route_in_one_pass(
    scores: Tensor, bias: Tensor, config: RouterConfig, top_k: int
) -> tuple[Tensor, Tensor]:
    from model.kernels.router import Rule, choose

    rule = Rule(
        top_k=top_k,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        is_group_max=config.group_score is GroupScore.max,
        is_renormalised=config.renormalise,
        scale=config.scale,
    )
    return choose(scores, bias if config.bias else None, rule)


def _keep_top_groups(choice: Tensor, config: RouterConfig) -> Tensor:
    """`choice` with the experts of all but the best groups at minus infinity."""
    grouped = choice.unflatten(-1, (config.num_groups, -1))  # [T, G, E/G]
    if config.group_score is GroupScore.max:
        group_scores = grouped.amax(dim=-1)
    else:
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    kept = group_scores.topk(config.top_groups, dim=-1, sorted=False).indices
    is_shut = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, value=False)
    return grouped.masked_fill(is_shut[..., None], float("-inf")).flatten(-2)


def check_router(config: RouterConfig, *, num_experts: int, top_k: int) -> None:
    """Refuse, with a ValueError, a choice that no token could make."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"model.moe.top_k={top_k} exceeds model.moe.num_experts={num_experts}; "
            "choose top_k <= num_experts"
            if top_k > num_experts
            else f"model.moe.top_k={top_k} must be positive; choose at least 1"
        )
    key = "model.moe.router"
    if config.num_groups < 1 or num_experts % config.num_groups:
        raise ValueError(
            f"{key}.num_groups={config.num_groups} does not divide "
            f"model.moe.num_experts={num_experts}; choose a divisor"
        )
    if not 1 <= config.top_groups <= config.num_groups:
        raise ValueError(
            f"{key}.top_groups={config.top_groups} must lie between 1 and "
            f"{key}.num_groups={config.num_groups}"
        )
    group_size = num_experts // config.num_groups
    if top_k > config.top_groups * group_size:
        raise ValueError(
            f"model.moe.top_k={top_k} exceeds the {config.top_groups * group_size} experts in "
            f"{key}.top_groups={config.top_groups} groups of {group_size}; "
            "raise top_groups or lower top_k"
        )
    if config.num_groups > 1 and config.group_score is GroupScore.top2_sum and group_size < 2:
        raise ValueError(
            f"{key}.group_score=top2_sum needs groups of at least 2 experts, but "
            f"{key}.num_groups={config.num_groups} leaves {group_size}; "
            "choose fewer groups or group_score=max"
        )
    if config.bias_update_speed < 0:
        raise ValueError(
            f"{key}.bias_update_speed={config.bias_update_speed} would drive experts out of "
            "balance; choose 0 or more"
        )
