"""The parts of a step, and which code belongs to which: the profiler's one table."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from torch import nn

import model.moe
from model.dispatch import Sent
from model.exchange import Journey
from model.experts import Experts
from model.ffn import SwiGLU
from model.gqa import GQA
from model.mla import MLA
from model.moe import MoE
from model.mtp import MTP
from model.norm import RMSNorm
from model.router import Router
from model.transformer import Transformer


class Part(StrEnum):
    """In the order of a step. The value is what tables and plots say."""

    data = "data"
    embedding = "embedding"
    norms = "norms"
    attention = "attention"
    dense = "dense feed-forward"
    router = "router"
    dispatch = "dispatch and combine"
    experts = "routed experts"
    shared = "shared experts"
    mtp = "MTP"  # its block and projection whole; its use of the head is the head's
    head = "head and loss"
    gradients = "gradients"  # added up over micro-batches, reduced over ranks
    optimizer = "optimizer"  # norm, clipping, update, the weights' new copies
    other = "other"
    profiler = "the profiler"  # its own work between the parts


class Region(NamedTuple):
    """A function, found as an attribute, whose time is a part's."""

    owner: Any
    name: str
    part: Part


OF_MODULES: dict[type[nn.Module], Part] = {
    MLA: Part.attention,
    GQA: Part.attention,
    RMSNorm: Part.norms,
    Router: Part.router,
    Experts: Part.experts,
    MTP: Part.mtp,
    nn.Embedding: Part.embedding,
}

OF_DISPATCH = (  # beside each layer's dispatcher
    (model.moe, "permute"),
    (model.moe, "combine"),
    (Sent, "arrive"),
    (Journey, "arrive"),
)


def regions(transformer: Transformer) -> Iterator[Region]:
    """What of the model's code is which part; the rest of it is `other`."""
    yield Region(transformer, "_loss", Part.head)
    for owner, name in OF_DISPATCH:
        yield Region(owner, name, Part.dispatch)
    for path, module in transformer.named_modules():
        found = part_of(path, module)
        if found is not None:
            yield Region(module, "forward", found)
        if isinstance(module, MoE):
            yield Region(module, "_count_and_balance", Part.router)
            for name in ("plan", "send", "send_back"):
                yield Region(module.dispatcher, name, Part.dispatch)


def part_of(path: str, module: nn.Module) -> Part | None:
    """The part that a module is, if it is one as a whole."""
    if isinstance(module, SwiGLU):
        return Part.shared if path.endswith(".shared") else Part.dense
    found = (part for kind, part in OF_MODULES.items() if isinstance(module, kind))
    return next(found, None)
