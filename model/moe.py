"""The mixture-of-experts layer: route -> dispatch -> experts -> combine, plus shared experts.

B batch, S sequence, D model width, E experts of all ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model.balance import count_load, group_balance_losses, sequence_balance_loss
from model.dispatch import Chunk, Dispatcher, Sent, combine, permute
from model.exchange import Here, Journey
from model.experts import Experts
from model.ffn import SwiGLU
from model.halves import Steps, in_turns
from model.recompute import Recompute, recomputed
from model.router import Router, RouterConfig, Routing, check_router
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
    #: Most rows (a token for one of its experts) that a rank's experts take at once. What exceeds
    #: it travels in chunks, which bounds memory under any routing; null takes all at once.
    max_tokens_per_chunk: int | None = None
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
    it all of them are here. No token is dropped. `in_halves`: what is given to it are halves of a
    micro-batch in turns.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        dim: int,
        expert_group: dist.ProcessGroup | None = None,
        sequences: Sequences | None = None,
        in_halves: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.in_halves = in_halves
        self.sequences = sequences or WholeSequences()
        self.num_experts = config.num_experts
        self.dispatcher = Dispatcher(
            num_experts=config.num_experts,
            group=expert_group,
            limit=_share_limit(config.max_tokens_per_chunk, in_halves=in_halves),
        )
        num_local = config.num_experts // self.dispatcher.num_ranks
        self.router = Router(
            config.router, dim=dim, num_experts=config.num_experts, top_k=config.top_k
        )
        self.experts = Experts(
            first=self.dispatcher.rank * num_local,
            num_local=num_local,
            dim=dim,
            inner_dim=config.expert_dim,
        )
        self.shared: SwiGLU | None = None
        if config.num_shared_experts:
            self.shared = SwiGLU(dim, config.num_shared_experts * config.expert_dim)

    def forward(self, x: Float[Tensor, "B S D"], counted: Bool[Tensor, "B S"]) -> MoEOutput:
        """`counted` says which tokens enter load and balance loss (padding must not)."""
        (output,) = in_turns(self.steps(x, counted))
        return output

    def steps(self, x: Float[Tensor, "B S D"], counted: Bool[Tensor, "B S"]) -> Steps[MoEOutput]:
        """The layer, which pauses while its rows are on their way: to experts, and back.

        What stands between a departure and an arrival is computed meanwhile, and so are, in the
        backward pass, its gradients (model/exchange.py). The shared experts stand beside dispatch;
        of two halves beside combine, where the second half has nothing else beside it.
        """
        tokens = x.flatten(0, 1)
        routing = self.router(tokens)
        plan = self.dispatcher.plan(routing.expert_ids)
        rows = permute(tokens, plan.order, top_k=self.config.top_k)
        sent = self._send(rows, plan.chunks[0]) if len(plan.chunks) == 1 else None
        yield
        shared = None if self.shared is None or self.in_halves else self.shared(x)
        if sent is None:
            returning: Journey | Here = Here(self._visit_in_chunks(rows, plan.chunks))
        else:
            returning = self._visit(sent, plan.chunks[0])
        yield
        if self.shared is not None and self.in_halves:
            shared = self.shared(x)
        balance = self._count_and_balance(routing, counted)
        hidden = combine(returning.arrive(), routing.weights, plan.order).view_as(x)
        return MoEOutput(hidden if shared is None else hidden + shared, *balance)

    def _send(self, rows: Float[Tensor, "R D"], chunk: Chunk) -> Sent:
        return self.dispatcher.send(rows, chunk, in_fp8=self.experts.is_fp8)

    def _visit(self, sent: Sent, chunk: Chunk) -> Journey | Here:
        """The results of rows that were sent, on their way back."""
        arrived = sent.arrive()
        outputs = self.experts(arrived.rows, chunk.counts)
        return self.dispatcher.send_back(outputs, arrived.places, chunk, in_fp8=self.experts.is_fp8)

    def _visit_in_chunks(
        self, rows: Float[Tensor, "TK D"], chunks: list[Chunk]
    ) -> Float[Tensor, "TK D"]:
        """Every row's result, one chunk after another. Only the rows at their sender are kept for
        the backward pass: each chunk travels and runs again there."""

        def there_and_back(part: Float[Tensor, "R D"], chunk: Chunk) -> Float[Tensor, "R D"]:
            return self._visit(self._send(part, chunk), chunk).arrive()

        visit = recomputed(there_and_back, mode=Recompute.full)
        parts = rows.split([sum(chunk.sent) for chunk in chunks])
        return torch.cat([visit(part, chunk) for part, chunk in zip(parts, chunks, strict=True)])

    def _count_and_balance(self, routing: Routing, counted: Bool[Tensor, "B S"]) -> "_Balance":
        expert_ids = routing.expert_ids.unflatten(0, counted.shape)
        scores = routing.scores.unflatten(0, counted.shape)
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
        return _Balance(load, balance_loss, group_losses)


class _Balance(NamedTuple):
    """As in `MoEOutput`."""

    load: Int64[Tensor, " E"]
    balance_loss: Float[Tensor, ""]
    group_balance_losses: Float[Tensor, "2"]


def _share_limit(limit: int | None, *, in_halves: bool) -> int | None:
    """Rows that may arrive at once. While one half's are computed the other's arrive."""
    return limit // 2 if limit is not None and in_halves else limit


def check_moe(config: MoEConfig) -> None:
    """Refuse, with a ValueError, sizes that make no layer."""
    for name in ("num_experts", "expert_dim"):
        if getattr(config, name) < 1:
            raise ValueError(f"model.moe.{name}={getattr(config, name)} must be at least 1")
    if config.max_tokens_per_chunk is not None and config.max_tokens_per_chunk < 1:
        raise ValueError(
            f"model.moe.max_tokens_per_chunk={config.max_tokens_per_chunk} must be at least 1; "
            "null takes all rows at once"
        )
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
