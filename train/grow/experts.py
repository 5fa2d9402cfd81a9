"""Which old experts each new expert comes from, and by what its weights are multiplied.

E experts of the old layer, E' of the new one, K and K' choices per token, D model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from model.moe import MoEConfig
from model.router import RouterConfig, Score
from train.grow.config import Shrink


class ExpertSource(NamedTuple):
    shares: dict[int, float]  # of old experts; they add up to 1
    is_copy: bool = False  # the original stands elsewhere
    is_dormant: bool = False  # `top_k` has no room for it: its bias keeps it out


class ExpertPlan(NamedTuple):
    """How a layer of experts changes. Docs: docs/grow.md, with the reasons for the factors."""

    sources: list[ExpertSource]  # one for each new expert
    active: int = 1  # clones of an expert that a token visits together
    down_scale: float = 1.0  # of the experts' output projections
    bias_scale: float = 1.0  # of the routing bias


def plan_experts(
    old: MoEConfig,
    new: MoEConfig,
    *,
    shrink: Shrink,
    load: Int64[Tensor, " E"] | None = None,
    rows: Float[Tensor, "E D"] | None = None,
) -> ExpertPlan:
    """The plan for one layer; `load` and `rows` (the router's) say which experts go and where to.

    Raises:
        ValueError: Groups and experts don't fit together.
    """
    if new.num_experts < old.num_experts:
        assert load is not None, "fewer experts are chosen by their use"
        assert rows is not None, "and by their routers' rows"
        return ExpertPlan(_shrink(old, new, load=load, rows=rows, shrink=shrink))
    copies = _place_copies(old, new)
    active = new.top_k // old.top_k if new.top_k % old.top_k == 0 else 1
    if active > new.num_experts // old.num_experts:
        active = 1  # more choices than clones: other experts join, and the function changes
    sources = [
        ExpertSource({expert: 1.0}, is_copy=copy > 0, is_dormant=copy >= active)
        for expert, copy in copies
    ]
    multiple = new.num_experts / old.num_experts
    is_softmax = old.router.score is Score.softmax
    down_scale = 1.0
    if not old.router.renormalise:
        down_scale = multiple / active if is_softmax else 1 / active
    return ExpertPlan(sources, active, down_scale, 1 / multiple if is_softmax else 1.0)


def guaranteed_offset(bias: Float[Tensor, " E"], router: RouterConfig) -> float:
    """So much off a clone's bias that every original comes before it: scores lie in [0, 1]."""
    return float(1.0 + bias.max() - bias.min()) + 1e-3 if router.bias else 0.0


def _place_copies(old: MoEConfig, new: MoEConfig) -> list[tuple[int, int]]:
    """Old expert and number of the copy at each new place.

    With as many groups as before a group keeps its experts and gets copies of them; with a
    multiple of the groups, of the same size, whole groups are copied.
    """
    old_size = old.num_experts // old.router.num_groups
    new_size = new.num_experts // new.router.num_groups
    if new.router.num_groups == old.router.num_groups:
        return [
            (group * old_size + place % old_size, place // old_size)
            for group in range(new.router.num_groups)
            for place in range(new_size)
        ]
    if old_size == new_size and new.router.num_groups % old.router.num_groups == 0:
        return [
            (place % old.num_experts, place // old.num_experts) for place in range(new.num_experts)
        ]
    raise ValueError(
        f"model.moe.router.num_groups={new.router.num_groups} with model.moe.num_experts="
        f"{new.num_experts}: keep the {old.router.num_groups} groups, or multiply groups and "
        "experts by the same number"
    )


def _shrink(
    old: MoEConfig, new: MoEConfig, *, load: Tensor, rows: Tensor, shrink: Shrink
) -> list[ExpertSource]:
    """The most used experts of each group; the others are left out or averaged into them."""
    groups = new.router.num_groups
    if groups != old.router.num_groups:
        raise ValueError(
            f"model.moe.router.num_groups={groups}: fewer experts need the run's "
            f"{old.router.num_groups} groups"
        )
    sources = []
    members = torch.arange(old.num_experts).unflatten(0, (groups, -1))
    for group in members:
        ranked = group[load[group].argsort(descending=True, stable=True)].tolist()
        kept = sorted(ranked[: new.num_experts // groups])
        weights = {expert: {expert: float(load[expert]) + 1.0} for expert in kept}
        if shrink is Shrink.merge:
            for expert in ranked[len(kept) :]:
                likeness = F.cosine_similarity(rows[kept], rows[expert], dim=-1)
                nearest = kept[int(likeness.argmax())]
                weights[nearest][expert] = float(load[expert]) + 1.0
        for expert in kept:
            total = sum(weights[expert].values())
            sources.append(ExpertSource({e: w / total for e, w in weights[expert].items()}))
    return sources
