"""Forced balance: every expert gets equally many rows, whatever a router would choose.

The router computes all that it does; then its choice is replaced by a fixed one, and the weights
by its scores there. What remains of a step is the same, so that two runs differ by routing alone.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from model.router import Router, Routing

if find_spec("transformers") is not None:  # ours alone are balanced without it
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
else:
    DeepseekV3TopkRouter = ()


def force_balance(module: nn.Module) -> None:
    """All routers in it, ours or transformers', choose experts in turn from now on."""
    for router in module.modules():
        if isinstance(router, Router):
            router.forward = partial(_ours, router, router.forward)
        elif isinstance(router, DeepseekV3TopkRouter):
            router.forward = partial(_theirs, router, router.forward)


def choose_in_turn(num_tokens: int, *, num_experts: int, top_k: int) -> Tensor:
    """Experts of every token [T, K], all different; tokens with the same ones lie anywhere."""
    ids = (torch.arange(num_tokens * top_k) % num_experts).unflatten(0, (num_tokens, top_k))
    return ids[torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))]


def _ours(router: Router, forward: Any, x: Tensor) -> Routing:
    scores = forward(x).scores
    ids = choose_in_turn(len(x), num_experts=scores.shape[1], top_k=router.top_k).to(x.device)
    weights = scores.gather(-1, ids)
    if router.config.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(ids, weights * router.config.scale, scores)


def _theirs(router: Any, forward: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = forward(x)[0]
    ids = choose_in_turn(len(logits), num_experts=router.num_experts, top_k=router.top_k)
    ids = ids.to(x.device)
    weights = logits.sigmoid().gather(-1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor
    return logits, weights, ids
