"""The mixture-of-experts layer: route -> dispatch -> experts -> combine, plus shared experts.

B batch, S sequence, D model width, E experts of all ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model.balance import count_load, group_balance_losses, sequence_balance_loss
from model.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from model.experts import Experts
from model.ffn import SwiGLU
from model.router import Router, RouterConfig, check_router
from model.sequences import Sequences, WholeSequences


@dataclass(slots=True, kw_only=True)
class MoEConfig:
    #: Routed experts per layer, over all ranks.
    num_experts: int
    #: Routed experts that each token visits.
    top_k: int
    #: Inner width of one routed expert.
    expert_dim: int
    #: Experts that every token visits, fused into one network of that many times the width.
    num_shared_experts: int = 1
    #: Weight of the sequence-wise balance loss.
    balance_loss_weight: float = 0.0001
    #: Weight of V2's device-level balance loss; its devices are `router.num_groups`' groups.
    device_balance_loss_weight: float = 0.0
    #: Weight of V2's communication balance loss, over the same groups.
    communication_balance_loss_weight: float = 0.0
    router: RouterConfig

    @property
    def has_group_balance_losses(self) -> bool:
        """Whether one of V2's losses over groups of experts has a weight."""
        return self.device_balance_loss_weight > 0 or self.communication_balance_loss_weight > 0


class MoEOutput(NamedTuple):
    hidden: Float[Tensor, "B S D"]
    load: Int64[Tensor, " E"]  # this rank's choices per expert
    balance_loss: Float[Tensor, ""]  # sum over this rank's sequences
    group_balance_losses: Float[Tensor, "2"]  # likewise: device-level, communication; 0 if unused


class MoE(nn.Module):
    """Every token through its top-k routed experts and through the shared ones.

    `expert_group` spreads the routed experts over its ranks, in order, in equal parts; without
    it all of them are here. No token is dropped.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        dim: int,
        expert_group: dist.ProcessGroup | None = None,
        sequences: Sequences | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.sequences = sequences or WholeSequences()
        self.num_experts = config.num_experts
        rank, num_ranks = 0, 1
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts=config.num_experts)
        if expert_group is not None:
            rank, num_ranks = dist.get_rank(expert_group), dist.get_world_size(expert_group)
            self.dispatcher = AllToAllDispatcher(num_experts=config.num_experts, group=expert_group)
        num_local = config.num_experts // num_ranks
        self.router = Router(
            config.router, dim=dim, num_experts=config.num_experts, top_k=config.top_k
        )
        self.experts = Experts(
            first=rank * num_local, num_local=num_local, dim=dim, inner_dim=config.expert_dim
        )
        self.shared: SwiGLU | None = None
        if config.num_shared_experts:
            self.shared = SwiGLU(dim, config.num_shared_experts * config.expert_dim)

    def forward(self, x: Float[Tensor, "B S D"], counted: Bool[Tensor, "B S"]) -> MoEOutput:
        """`counted` says which tokens enter load and balance loss (padding must not)."""
        tokens = x.flatten(0, 1)
        routing = self.router(tokens)
        dispatched = self.dispatcher.dispatch(tokens, routing)
        outputs = self.experts(dispatched.rows, dispatched.counts)
        hidden = self.dispatcher.combine(outputs, dispatched.trip, routing).view_as(x)
        if self.shared is not None:
            hidden = hidden + self.shared(x)

        expert_ids = routing.expert_ids.unflatten(0, x.shape[:2])
        scores = routing.scores.unflatten(0, x.shape[:2])
        load = count_load(expert_ids, counted, num_experts=self.num_experts)
        total = self.sequences.total
        balance_loss = sequence_balance_loss(scores, expert_ids, counted, total=total)
        group_losses = scores.new_zeros(2)
        if self.config.has_group_balance_losses:
            group_losses = group_balance_losses(
                scores,
                expert_ids,
                counted,
                num_groups=self.config.router.num_groups,
                top_groups=self.config.router.top_groups,
                total=total,
            )
        return MoEOutput(hidden, load, balance_loss, group_losses)


def check_moe(config: MoEConfig) -> None:
    """Refuse, with a ValueError, sizes that make no layer."""
    for name in ("num_experts", "expert_dim"):
        if getattr(config, name) < 1:
            raise ValueError(f"model.moe.{name}={getattr(config, name)} must be at least 1")
    group_losses = ("device_balance_loss_weight", "communication_balance_loss_weight")
    for name in ("num_shared_experts", "balance_loss_weight", *group_losses):
        if getattr(config, name) < 0:
            raise ValueError(f"model.moe.{name}={getattr(config, name)} must not be negative")
    for name in group_losses:
        if getattr(config, name) > 0 and config.router.num_groups == 1:
            raise ValueError(
                f"model.moe.{name}={getattr(config, name)} has nothing to balance in "
                "model.moe.router.num_groups=1; choose 2 groups or more, or weight 0"
            )
    check_router(config.router, num_experts=config.num_experts, top_k=config.top_k)
