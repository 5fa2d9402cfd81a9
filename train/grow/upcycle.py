"""A dense feed-forward network becomes a layer of experts (sparse upcycling, arXiv:2212.05055).

The network is cut into g pieces of an expert's width, and each piece stands in the layer r = E / g
times. All pieces of one replica share a router row, so a token's K choices are K / g whole replicas
(for g = 1: K copies of the network).
"""

from typing import NamedTuple

from model.config import ModelConfig
from model.moe import MoEConfig
from model.router import Score

TINY = 1e-6  # of the router's initial rows: tokens spread, weights stay equal
BIAS_STEP = 1e-3  # between replicas, so that no token's choice cuts through one


class UpcyclePlan(NamedTuple):
    pieces: int  # g, of one network
    replicas: int  # r, of each piece
    down_scale: float  # of the experts' output projections
    row_scale: float  # of the router's initial rows
    bias_step: float  # between one replica's routing bias and the next one's


def plan_upcycling(model: ModelConfig, moe: MoEConfig) -> UpcyclePlan:
    """How the dense networks of `model` fill the experts.

    Raises:
        ValueError: The widths or counts don't divide.
    """
    pieces, rest = divmod(model.ffn_dim, moe.expert_dim)
    if rest or not pieces:
        raise ValueError(
            f"model.moe.expert_dim={moe.expert_dim} does not divide model.ffn_dim={model.ffn_dim}, "
            "the width of the networks that become experts; choose a divisor"
        )
    for name in ("num_experts", "top_k"):
        if getattr(moe, name) % pieces:
            raise ValueError(
                f"model.moe.{name}={getattr(moe, name)} is not a multiple of the {pieces} experts "
                f"(of model.moe.expert_dim={moe.expert_dim}) that make up one dense network"
            )
    router = moe.router
    if (moe.num_experts // router.num_groups) % pieces:
        raise ValueError(
            f"model.moe.router.num_groups={router.num_groups} cuts through the {pieces} experts "
            "that make up one dense network; choose fewer groups"
        )
    if router.renormalise:
        weight = router.scale / moe.top_k
    else:
        weight = router.scale * (1 / moe.num_experts if router.score is Score.softmax else 0.5)
    chosen = moe.top_k // pieces
    keeps_weights_equal = not router.renormalise and (pieces == 1 or router.bias)
    return UpcyclePlan(
        pieces=pieces,
        replicas=moe.num_experts // pieces,
        down_scale=1 / (chosen * weight),
        row_scale=TINY if keeps_weights_equal else 1.0,
        bias_step=BIAS_STEP if keeps_weights_equal and pieces > 1 else 0.0,
    )
