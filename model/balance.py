"""Load balance: what an expert gets, what imbalance costs, and the bias that corrects it.

B batch, S sequence, E experts, K choices per token, G groups of experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def count_load(
    expert_ids: Int64[Tensor, "B S K"], counted: Bool[Tensor, "B S"], *, num_experts: int
) -> Int64[Tensor, " E"]:
    """Choices that fell on each expert, exact, over the tokens that are `counted`."""
    ones = counted[..., None].expand_as(expert_ids).to(torch.int64)
    load = expert_ids.new_zeros(num_experts)
    return load.scatter_add_(0, expert_ids.flatten(), ones.flatten())


def all_here(counts: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """The `total` of sequences of which every token is here: the counts themselves."""
    return counts


def sequence_balance_loss(
    scores: Float[Tensor, "B S E"],
    expert_ids: Int64[Tensor, "B S K"],
    counted: Bool[Tensor, "B S"],
    *,
    total: Callable[[Tensor], Tensor] = all_here,
) -> Float[Tensor, ""]:
    """Sum over sequences of sum_i f_i P_i (arXiv:2412.19437, equations 17-20, without alpha).

    f_i is expert i's share of the sequence's choices times E; P_i is the mean of its normalised
    score. Only `counted` tokens enter, in numerators and denominators; a perfectly balanced
    sequence gives 1, one without counted tokens 0.

    Where only a part of each sequence is here, `total` turns counts of its tokens into the
    sequence's, and the losses of the parts add up to the sequence's: f_i and the length have no
    gradient, and P_i is a sum over tokens.
    """
    num_experts, top_k = scores.shape[-1], expert_ids.shape[-1]
    chosen, affinity, length = _sums_of_sequences(scores, expert_ids, counted, total)
    frequency = chosen * (num_experts / top_k) / length
    return (frequency * (affinity / length)).sum()


def group_balance_losses(
    scores: Float[Tensor, "B S E"],
    expert_ids: Int64[Tensor, "B S K"],
    counted: Bool[Tensor, "B S"],
    *,
    num_groups: int,
    top_groups: int,
    total: Callable[[Tensor], Tensor] = all_here,
) -> Float[Tensor, "2"]:
    """V2's device-level and communication losses, summed over sequences, without their alphas.

    A device is one of G groups of experts, of which a token visits at most `top_groups`
    (arXiv:2405.04434, equations 26 to 31). Device-level: sum_g f_g P_g, where f_g is the mean of
    its experts' f_i, P_g the sum of their P_i, both as in `sequence_balance_loss`. Communication:
    f_g is the share of the sequence's tokens that visit the group, times G / top_groups.
    """
    num_experts, top_k = scores.shape[-1], expert_ids.shape[-1]
    group_ids = expert_ids // (num_experts // num_groups)
    chosen, affinity, length = _sums_of_sequences(scores, expert_ids, counted, total)
    frequency = chosen * (num_experts / top_k) / length
    is_visited = scores.new_zeros(*counted.shape, num_groups).scatter_(-1, group_ids, 1.0)
    visits = total((is_visited * counted[..., None]).sum(dim=1))  # [B, G]
    visit_frequency = visits * (num_groups / top_groups) / length
    of_groups = (affinity / length).unflatten(-1, (num_groups, -1)).sum(dim=-1)  # [B, G]
    device = (frequency.unflatten(-1, (num_groups, -1)).mean(dim=-1) * of_groups).sum()
    return torch.stack((device, (visit_frequency * of_groups).sum()))


class _SequenceSums(NamedTuple):
    chosen: Float[Tensor, "B E"]  # choices that fell on each expert
    affinity: Float[Tensor, "B E"]  # of normalised scores
    length: Float[Tensor, "B 1"]  # counted tokens; 1 where there are none


def _sums_of_sequences(
    scores: Tensor, expert_ids: Tensor, counted: Tensor, total: Callable[[Tensor], Tensor]
) -> _SequenceSums:
    """Chosen and length of whole sequences, affinity of what is here of them."""
    is_counted = counted[..., None].to(scores.dtype)
    chosen = torch.zeros_like(scores).scatter_(-1, expert_ids, 1.0)
    affinity = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    choices = total((chosen * is_counted).sum(dim=1))
    # Each token makes K choices, so that their sum tells the length: one message says both.
    length = choices.sum(dim=1, keepdim=True) / expert_ids.shape[-1]
    return _SequenceSums(choices, (affinity * is_counted).sum(dim=1), length.clamp(min=1))


def step_bias(
    bias: Float[Tensor, "*layers E"], load: Int64[Tensor, "*layers E"], *, speed: float
) -> None:
    """Move each bias by `speed` against its expert's excess load, in place.

    b_i += speed * sign(mean load - load_i) (arXiv:2408.15664). Compared as integers, so that
    the sign is exact whatever the counts.
    """
    total = load.sum(dim=-1, keepdim=True)
    bias += speed * torch.sign(total - load * load.shape[-1])


def max_violation(load: Int64[Tensor, "*layers E"]) -> Float[Tensor, "*layers"]:
    """MaxVio: the busiest expert's excess over the mean load, relative (arXiv:2408.15664, 3.1)."""
    mean = load.double().mean(dim=-1)
    return (load.amax(dim=-1) - mean) / mean.clamp(min=1e-20)
