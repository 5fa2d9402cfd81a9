"""Dispatch and combine: rows travel to their experts and back. Ranks meet only here.

T tokens of this rank, K choices per token, D width, E experts of all ranks, L experts of this
rank, P ranks of the expert-parallel group, N rows that this rank's experts receive in a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.backends import Backend, choose_rows
from model.chunks import split_into_chunks
from model.exchange import IN_FP8, PLAIN, Here, Journey, Route
from model.recompute import rebuild
from model.whereabouts import HERE


class Chunk(NamedTuple):
    """Rows that travel together, as this rank sees them."""

    sent: list[int]  # rows for each rank
    received: list[int]  # rows from each rank
    counts: list[int]  # rows of each of the L experts
    runs: Int64[Tensor, "P L"]  # the same, by the rank that they come from


class Plan(NamedTuple):
    """Which rows travel when. All ranks of the group have equally many chunks."""

    order: Int64[Tensor, " TK"]  # choice (token * K + k) of each row, sorted by chunk, then expert
    chunks: list[Chunk]


class Arrived(NamedTuple):
    """Rows sorted by this rank's experts, and the place at which each of them arrived."""

    rows: Float[Tensor, "N D"]
    places: Int64[Tensor, " N"] | None  # None where the order is the same


class Sent(NamedTuple):
    """Rows on their way to their experts."""

    journey: Journey | Here
    places: Int64[Tensor, " N"] | None

    def arrive(self) -> Arrived:
        rows = self.journey.arrive()
        if self.places is None:
            return Arrived(rows, None)
        return Arrived(_Reorder.apply(rows, self.places), self.places)


class Dispatcher:
    """Sends rows to the ranks of a group that own their experts, and results back.

    Either is under way until `arrive` is called on what `send` and `send_back` return.

    Without a group all experts are here: nothing travels. No row is ever dropped: the ranks
    exchange as many rows as the routing says, in as many chunks as keep what any of them receives
    at once within `limit`. `in_fp8` what goes to experts (rows, and in the backward pass their
    results' gradients) travels in FP8; what comes from them never does.
    """

    def __init__(
        self, *, num_experts: int, group: dist.ProcessGroup | None = None, limit: int | None = None
    ) -> None:
        self.num_experts = num_experts
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.num_ranks = 1 if group is None else dist.get_world_size(group)
        self.limit = limit
        self.place = ""  # the layer's name, for whoever asks where a rank waits

    def plan(self, expert_ids: Int64[Tensor, "T K"]) -> Plan:
        """Every rank learns all counts, so all agree on the chunks without a further message."""
        order, counts = sort_choices(expert_ids, num_experts=self.num_experts)
        of_ranks = self._gather(counts)
        rows = split_into_chunks(of_ranks, limit=self.limit)  # [C, P, E]
        if len(rows) > 1:  # they lie by expert and then chunk, and shall lie the other way round
            mine = rows[:, self.rank].t().to(order.device, non_blocking=True)
            order = order[swap_runs(mine, total=order.numel())]
        rows = rows.unflatten(2, (self.num_ranks, -1))  # [C, from, to, L]
        sent = rows[:, self.rank].sum(dim=2).tolist()
        to_here = rows[:, :, self.rank]  # [C, from, L]
        received, of_experts = to_here.sum(dim=2).tolist(), to_here.sum(dim=1).tolist()
        runs = to_here.to(order.device, non_blocking=True)  # the host goes on
        fields = zip(sent, received, of_experts, runs, strict=True)
        return Plan(order, [Chunk(*of_chunk) for of_chunk in fields])

    def send(self, rows: Float[Tensor, "R D"], chunk: Chunk, *, in_fp8: bool = False) -> Sent:
        """A chunk's rows on their way to the ranks of their experts."""
        if self.group is None:
            return Sent(Here(rows), None)
        route = Route(chunk.sent, chunk.received, self.group, "dispatch", self.place)
        journey = Journey(rows, route, there=IN_FP8 if in_fp8 else PLAIN)
        return Sent(journey, swap_runs(chunk.runs, total=sum(chunk.received)))

    def send_back(
        self,
        outputs: Float[Tensor, "N D"],
        places: Int64[Tensor, " N"] | None,
        chunk: Chunk,
        *,
        in_fp8: bool = False,
    ) -> Journey | Here:
        """The experts' outputs on their way to the ranks, and to the order, of their rows."""
        if self.group is None or places is None:
            return Here(outputs)
        by_rank = _Reorder.apply(outputs, invert(places))
        route = Route(chunk.received, chunk.sent, self.group, "combine", self.place)
        return Journey(by_rank, route, back=IN_FP8 if in_fp8 else PLAIN)

    def _gather(self, counts: Int64[Tensor, " E"]) -> Int64[Tensor, "P E"]:
        """All ranks' counts, in host memory: sizes of messages and products must be known there.

        The layer's one wait of the host for its device.
        """
        if self.group is None:
            return counts[None].cpu()
        of_ranks = counts.new_empty(self.num_ranks, self.num_experts)
        with HERE.doing("exchange of counts", self.place):
            dist.all_gather(list(of_ranks), counts, group=self.group)
            return of_ranks.cpu()


class Sorted(NamedTuple):
    order: Int64[Tensor, " TK"]  # choice (token * K + k) of each row
    counts: Int64[Tensor, " E"]


def sort_choices(expert_ids: Int64[Tensor, "T K"], *, num_experts: int) -> Sorted:
    """All choices sorted by expert; among equals, by token."""
    chosen = expert_ids.flatten()
    counts = chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))
    return Sorted(chosen.argsort(stable=True), counts)


def permute(
    tokens: Float[Tensor, "T D"], order: Int64[Tensor, " TK"], *, top_k: int
) -> Float[Tensor, "TK D"]:
    """One row per choice, in that order."""
    gather: Callable[..., Tensor] = _Gather.apply
    if choose_rows(tokens.device).backend is Backend.triton:
        from model.kernels import rows

        gather = rows.permute
    return rebuild(gather, tokens, order, top_k)


def combine(
    outputs: Float[Tensor, "TK D"], weights: Float[Tensor, "T K"], order: Int64[Tensor, " TK"]
) -> Float[Tensor, "T D"]:
    """Each token's weighted sum of its K results."""
    add_up: Callable[..., Tensor] = _WeightedSum.apply
    if choose_rows(outputs.device).backend is Backend.triton:
        from model.kernels import rows

        add_up = rows.combine
    return add_up(outputs, weights.to(outputs.dtype), order)


def swap_runs(counts: Int64[Tensor, "A B"], *, total: int) -> Int64[Tensor, " N"]:
    """New place -> old place, for rows that lay by a and then b and shall lie by b and then a.

    `counts` are the rows of each (a, b), `total` their sum, known to the host.
    """
    b = torch.arange(counts.shape[1], device=counts.device).expand_as(counts).flatten()
    return b.repeat_interleave(counts.flatten(), output_size=total).argsort(stable=True)


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
