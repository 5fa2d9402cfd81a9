"""Load balance: what an expert gets, what imbalance costs, and the bias that corrects it.

B batch, S sequence, E experts, K choices per token.
"""

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


def sequence_balance_loss(
    scores: Float[Tensor, "B S E"], expert_ids: Int64[Tensor, "B S K"], counted: Bool[Tensor, "B S"]
) -> Float[Tensor, ""]:
    """Sum over sequences of sum_i f_i P_i (arXiv:2412.19437, equations 17-20, without alpha).

    f_i is expert i's share of the sequence's choices times E; P_i is the mean of its normalised
    score. Only `counted` tokens enter, in numerators and denominators; a perfectly balanced
    sequence gives 1, one without counted tokens 0.
    """
    num_experts, top_k = scores.shape[-1], expert_ids.shape[-1]
    length = counted.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
    is_counted = counted[..., None].to(scores.dtype)
    chosen = torch.zeros_like(scores).scatter_(-1, expert_ids, 1.0)
    frequency = (chosen * is_counted).sum(dim=1) * (num_experts / top_k) / length
    affinity = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    mean_affinity = (affinity * is_counted).sum(dim=1) / length
    return (frequency * mean_affinity).sum()


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
