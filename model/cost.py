"""What a model costs, exactly: parameters and FLOPs per component, from its config.

Nothing is allocated: the model is built on the meta device and its tensors are counted.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from model.config import ModelConfig
from model.transformer import Transformer

EMBEDDING, ATTENTION, ROUTED, HEAD, MTP = "embedding", "attention", "routed experts", "head", "MTP"

# A component of the model, and the parameters in it by name: the first pattern found counts.
COMPONENTS: tuple[tuple[str, str], ...] = (
    (EMBEDDING, r"^embed\."),
    (MTP, r"^mtp\."),
    ("norms", r"(^|\.|_)norm\.weight$"),
    (ATTENTION, r"\.attention\."),
    ("router", r"\.router\."),
    ("shared experts", r"\.shared\."),
    (ROUTED, r"\.experts\."),
    ("dense feed-forward", r"\.ffn\."),
    (HEAD, r"^head\."),
)

FLOPS_PER_WEIGHT = 6  # of a product: multiply and add, forward and twice backward


class Share(NamedTuple):
    """Parameters of a component. `active` are those that one token meets.

    A token meets its top-k of the routed experts, and one row of the embedding: `active` leaves
    the embedding out, unless it is the head as well.
    """

    total: int
    active: int


class Parameters(NamedTuple):
    """Counts of parameters. MTP is apart, as in the published counts (V3: 671B without it)."""

    total: int
    active: int  # see `Share`
    embedding: int
    mtp: int


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of the model that `config` describes."""
    shares = parameters_by_component(config)
    mtp = shares.pop(MTP)
    total, active = (sum(column) for column in zip(*shares.values(), strict=True))
    return Parameters(total, active, shares[EMBEDDING].total, mtp.total)


def flops_per_token(config: ModelConfig, *, seq_len: int) -> float:
    """FLOPs of training on one token; see `flops_by_component`."""
    return sum(flops_by_component(config, seq_len=seq_len).values())


def component_of(name: str) -> str:
    """The component that the parameter of this name belongs to."""
    return next(component for component, rule in COMPONENTS if re.search(rule, name))


def parameters_by_component(config: ModelConfig) -> dict[str, Share]:
    """Every component's parameters, 0 where the model has none."""
    shares = {component: Share(0, 0) for component, _ in COMPONENTS}
    for component, parameter, active in _named_parameters(config):
        total = shares[component].total + parameter.numel()
        shares[component] = Share(total, shares[component].active + active)
    return shares


def flops_by_component(config: ModelConfig, *, seq_len: int | float) -> dict[str, float]:
    """FLOPs of training on one token: matrix products of forward and backward (3 x forward).

    A product with P weights costs 2 P forward. Attention costs 2 (key width + value width) per
    head and token seen, (seq_len + 1) / 2 of them on average under the causal mask. MTP's block,
    projection and further use of the head count; recomputation does not (model FLOPs, as in MFU).
    Where documents of several lengths do not see each other, `seq_len` is their tokens' mean.
    """
    head = FLOPS_PER_WEIGHT * config.vocab_size * config.dim
    per_layer = FLOPS_PER_WEIGHT * config.attention.product_dims * (seq_len + 1) / 2
    flops = {component: 0.0 for component, _ in COMPONENTS}
    for component, parameter, active in _named_parameters(config):
        is_product = parameter.ndim > 1 and component not in (EMBEDDING, HEAD)
        flops[component] += FLOPS_PER_WEIGHT * active * is_product
    flops[HEAD] += head  # the embedding's matrix where they are tied
    flops[ATTENTION] += per_layer * config.num_layers
    flops[MTP] += (per_layer + head) * config.mtp.depth
    return flops


def flops_by_block(config: ModelConfig, *, seq_len: int) -> list[float]:
    """FLOPs of training on one token, block by block; the last entry is what follows them."""
    per_layer = FLOPS_PER_WEIGHT * config.attention.product_dims * (seq_len + 1) / 2
    with torch.device("meta"):
        model = Transformer(config)
    blocks = [
        per_layer
        + FLOPS_PER_WEIGHT * sum(_active(p, config) for p in block.parameters() if p.ndim > 1)
        for block in model.layers
    ]
    by_component = flops_by_component(config, seq_len=seq_len)
    return [*blocks, by_component[HEAD] + by_component[MTP]]


def _named_parameters(config: ModelConfig) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Component, tensor, and how many of its elements are active, for every parameter."""
    with torch.device("meta"):
        model = Transformer(config)
    for name, parameter in model.named_parameters():
        component = component_of(name)
        active = _active(parameter, config)
        if component == EMBEDDING and not config.tie_embedding:
            active = 0
        yield component, parameter, active


def _active(parameter: nn.Parameter, config: ModelConfig) -> int:
    """How many of a product's weights one token meets."""
    if parameter.ndim < 3:
        return parameter.numel()
    assert config.moe is not None, "a stack is of routed experts"
    return parameter.numel() * config.moe.top_k // config.moe.num_experts
