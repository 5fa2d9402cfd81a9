"""Dispatch and combine: rows travel to their experts and back. Ranks meet only here.

T tokens of this rank, K choices per token, D width, E experts of all ranks, L experts of this
rank, P ranks of the expert-parallel group, N rows that this rank's experts receive.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.recompute import rebuild
from model.router import Routing


class Dispatched(NamedTuple):
    """Rows sorted by this rank's experts, with what is needed to send results back."""

    rows: Float[Tensor, "N D"]
    counts: list[int]  # rows of each of the L experts
    trip: "Trip"


class Trip(NamedTuple):
    """How rows came: the way back is the same in reverse."""

    order: Int64[Tensor, " TK"]  # choice (token * K + k) of each row, sorted by expert
    regroup: Int64[Tensor, " N"] | None = None  # row received -> row sorted by local expert
    sent: list[int] | None = None  # rows sent to each rank
    received: list[int] | None = None  # rows received from each rank


class Dispatcher(Protocol):
    def dispatch(self, tokens: Float[Tensor, "T D"], routing: Routing) -> Dispatched: ...

    def combine(
        self, outputs: Float[Tensor, "N D"], trip: Trip, routing: Routing
    ) -> Float[Tensor, "T D"]: ...


class LocalDispatcher:
    """All experts are here: dispatch is a sort, combine its inverse."""

    def __init__(self, *, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, tokens: Float[Tensor, "T D"], routing: Routing) -> Dispatched:
        rows, counts, order = permute(tokens, routing, num_experts=self.num_experts)
        return Dispatched(rows, counts.tolist(), Trip(order))

    def combine(
        self, outputs: Float[Tensor, "N D"], trip: Trip, routing: Routing
    ) -> Float[Tensor, "T D"]:
        return unpermute(outputs, routing.weights, trip.order)


class AllToAllDispatcher:
    """Experts are spread over a group: rows go to the rank that owns their expert.

    No row is ever dropped; the group's ranks exchange as many rows as the routing says.
    """

    def __init__(self, *, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = group
        self.num_ranks = dist.get_world_size(group)

    def dispatch(self, tokens: Float[Tensor, "T D"], routing: Routing) -> Dispatched:
        rows, counts, order = permute(tokens, routing, num_experts=self.num_experts)
        counts_here = torch.empty_like(counts)
        dist.all_to_all_single(counts_here, counts, group=self.group)
        # One transfer to the host: sizes of messages must be known there.
        both = torch.stack((counts, counts_here)).unflatten(-1, (self.num_ranks, -1)).tolist()
        sent = [sum(of_rank) for of_rank in both[0]]
        received = [sum(of_rank) for of_rank in both[1]]
        arrived: Tensor = _Exchange.apply(rows, sent, received, self.group)
        regroup = sort_by_expert(counts_here.unflatten(-1, (self.num_ranks, -1)))
        local_counts = [sum(of_expert) for of_expert in zip(*both[1], strict=True)]
        trip = Trip(order, regroup, sent, received)
        return Dispatched(_Reorder.apply(arrived, regroup), local_counts, trip)

    def combine(
        self, outputs: Float[Tensor, "N D"], trip: Trip, routing: Routing
    ) -> Float[Tensor, "T D"]:
        assert trip.regroup is not None, "the trip began in this dispatcher"
        by_rank = _Reorder.apply(outputs, invert(trip.regroup))
        returned: Tensor = _Exchange.apply(by_rank, trip.received, trip.sent, self.group)
        return unpermute(returned, routing.weights, trip.order)


class Permuted(NamedTuple):
    rows: Float[Tensor, "TK D"]
    counts: Int64[Tensor, " E"]
    order: Int64[Tensor, " TK"]


def permute(tokens: Float[Tensor, "T D"], routing: Routing, *, num_experts: int) -> Permuted:
    """One row per choice, sorted by expert; among equals, by token."""
    chosen = routing.expert_ids.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
    rows: Tensor = rebuild(_Gather.apply, tokens, order, routing.expert_ids.shape[1])
    return Permuted(rows, counts, order)


def unpermute(
    outputs: Float[Tensor, "TK D"], weights: Float[Tensor, "T K"], order: Int64[Tensor, " TK"]
) -> Float[Tensor, "T D"]:
    """Each token's weighted sum of its K results."""
    mixed: Tensor = _WeightedSum.apply(outputs, weights.to(outputs.dtype), order)
    return mixed


def sort_by_expert(counts: Int64[Tensor, "P L"]) -> Int64[Tensor, " N"]:
    """Sorted place -> arrival place, for rows that arrived rank by rank, each by expert."""
    expert = torch.arange(counts.shape[1], device=counts.device).expand_as(counts)
    return expert.flatten().repeat_interleave(counts.flatten()).argsort(stable=True)


def invert(permutation: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse


# The gathers below are permutations, so their backwards are gathers too. Autograd would use
# atomic scatter-adds instead: slower, and in another order of summation at each run.


class _Gather(torch.autograd.Function):
    """Row i is the token of choice `order[i]`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        rows_of_token = invert(order).unflatten(0, (-1, ctx.top_k))
        return F.embedding_bag(rows_of_token, grad, mode="sum"), None, None


class _WeightedSum(torch.autograd.Function):
    """Token t is the sum over k of `weights[t, k]` times the result of choice (t, k)."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(outputs, weights, order)
        rows_of_token = invert(order).view_as(weights)
        return F.embedding_bag(rows_of_token, outputs, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        outputs, weights, order = ctx.saved_tensors
        by_row = grad.index_select(0, order // weights.shape[1])
        grad_weights = torch.empty_like(weights)
        grad_weights.view(-1)[order] = torch.bmm(by_row[:, None], outputs[:, :, None])[:, 0, 0]
        return by_row.mul_(weights.flatten()[order, None]), grad_weights, None


class _Reorder(torch.autograd.Function):
    """`rows[order]` for a permutation `order`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, invert(order)), None


class _Exchange(torch.autograd.Function):
    """All-to-all of rows with uneven splits; its backward is the exchange in reverse."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
