"""What a model costs, exactly: parameters per component and FLOPs per token, from its config.

Nothing is allocated: the model is built on the meta device and its tensors are counted.
"""

from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.experts import Experts
from model.transformer import Transformer


class Parameters(NamedTuple):
    """Counts of parameters. `active` are those that one token meets.

    MTP is apart, as in the published counts (V3: 671B and 37B without it). `active` leaves out
    the input embedding, of which a token meets one row, unless it is the head as well.
    """

    total: int
    active: int
    embedding: int
    mtp: int


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of the model that `config` describes."""
    model = _build_on_meta(config)
    mtp = _count(model.mtp)
    embedding = _count(model.embed)
    total = _count(model) - mtp
    idle = 0
    if config.moe is not None:
        experts = [module for module in model.layers.modules() if isinstance(module, Experts)]
        routed = sum(map(_count, experts))
        idle = routed - routed * config.moe.top_k // config.moe.num_experts
    unused = 0 if config.tie_embedding else embedding
    return Parameters(total, total - idle - unused, embedding, mtp)


def flops_per_token(config: ModelConfig, *, seq_len: int) -> float:
    """FLOPs of training on one token: matrix products of forward and backward (3 x forward).

    A product with P weights costs 2 P forward. Attention costs 2 (key width + value width) per
    head and token seen, (seq_len + 1) / 2 of them on average under the causal mask. MTP's block,
    projection and further use of the head count; recomputation does not (model FLOPs, as in MFU).
    """
    model = _build_on_meta(config)
    products = _active_products(model, config)
    head = config.vocab_size * config.dim
    products += head * (1 + config.mtp.depth)
    per_layer = 2 * config.attention.product_dims * (seq_len + 1) / 2
    layers = config.num_layers + config.mtp.depth
    return 3 * (2 * products + per_layer * layers)


def _active_products(model: Transformer, config: ModelConfig) -> int:
    """Weights of blocks and MTP that one token is multiplied by (matrices only)."""
    products = 0
    for part in (model.layers, model.mtp):
        for name, parameter in part.named_parameters():
            if parameter.ndim == 3:  # a stack of experts
                assert config.moe is not None, "a dense model has no stacks"
                products += parameter.numel() * config.moe.top_k // config.moe.num_experts
            elif parameter.ndim == 2:
                assert name.endswith("weight"), f"{name} is a matrix without a product"
                products += parameter.numel()
    return products


def _build_on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
