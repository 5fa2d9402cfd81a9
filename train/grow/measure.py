"""What a model makes of a text, one block in memory at a time, from wherever its tensors come.

B sequences, S tokens, V vocabulary, E experts.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from model.config import ModelConfig
from model.mtp import shift_back
from model.rope import rotation
from model.transformer import Transformer

Fill = Callable[[str, Tensor], None]
"""Fills a parameter or buffer of the model, by its name."""


class Function(NamedTuple):
    """The function at a text."""

    logits: list[Float[Tensor, "B S V"]]  # the head's, then those of each MTP depth
    loss: float  # nats per token, of the head
    load: dict[str, Int64[Tensor, " E"]]  # choices per expert, by the block's prefix


class Difference(NamedTuple):
    """Between two functions at the same text."""

    relative: float  # largest difference of the logits over the largest logit
    mtp_relative: list[float]  # likewise of each MTP depth
    old_loss: float
    new_loss: float


@torch.no_grad()
def run_model(config: ModelConfig, fill: Fill, tokens: Int64[Tensor, "B S"]) -> Function:
    """Logits, loss and expert load; blocks come into memory and go again in turn."""
    with torch.device("meta"):
        model = Transformer(config).eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    turn = rotation(config.rope, positions, dim=config.attention.rotated_dim)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    segments = [tokens.shape[1]] * len(tokens)
    load: dict[str, Tensor] = {}

    def run(prefix: str, block: nn.Module, *inputs: Tensor) -> Tensor:
        _bring(block, prefix, fill)
        out = block(*inputs, turn, counted, segments=segments)
        block.to("meta")
        if out.load is not None:
            load[prefix] = out.load
        return cast(Tensor, out.hidden)

    embedded = _bring(model.embed, "embed.", fill)(tokens)
    hidden = embedded
    for i, layer in enumerate(model.layers):
        hidden = run(f"layers.{i}.", layer, hidden)
    hidden = _bring(model.norm, "norm.", fill)(hidden)
    if model.head is not None:
        _bring(model.head, "head.", fill)
    logits = [F.linear(hidden, model.head_weight)]
    for depth, mtp in enumerate(model.mtp, start=1):
        hidden = run(f"mtp.{depth - 1}.", mtp, hidden, shift_back(embedded, depth))
        logits.append(F.linear(hidden, model.head_weight))
    loss = F.cross_entropy(logits[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
    return Function(logits, loss, load)


def compare(old: Function, new: Function) -> Difference:
    """How far the new function is from the old one."""
    relative = [
        ((b - a).abs().max() / a.abs().max()).item()
        for a, b in zip(old.logits, new.logits, strict=True)
    ]
    return Difference(relative[0], relative[1:], old.loss, new.loss)


def describe(difference: Difference) -> list[str]:
    """Lines for a person."""
    change = difference.new_loss - difference.old_loss
    return [
        f"logits change by  {difference.relative:.1e} of the largest",
        *(
            f"  of MTP depth {k}  {relative:.1e}"
            for k, relative in enumerate(difference.mtp_relative, start=1)
        ),
        f"loss              {difference.old_loss:.4f} -> {difference.new_loss:.4f} nats per token "
        f"({change:+.1e}; perplexity times {math.exp(min(change, 700)):.4f})",
    ]


def _bring(module: Any, prefix: str, fill: Fill) -> Any:
    """The module with memory and values."""
    module.to_empty(device="cpu")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        fill(prefix + name, tensor)
    return module
