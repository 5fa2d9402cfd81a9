"""The states of a forward pass, small enough to be kept for every layer and token.

Of each watched module's output every token keeps one number: its product with a fixed random
direction. B sequences of a micro-batch, S tokens each, D the output's width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.block import Block
from model.ffn import SwiGLU
from model.gqa import GQA
from model.halves import Steps
from model.mla import MLA
from model.moe import MoE, MoEOutput
from model.mtp import MTP
from model.router import Router
from model.transformer import Transformer

# Not the embedding: the last stage of a pipeline looks tokens up again.
WATCHED = (MLA, GQA, Router, SwiGLU, MoE, Block, MTP)
FINAL_NORM = "norm"


class ForwardStates:
    """What the watched modules put out, by name and micro-batch, in the order of the forward."""

    def __init__(self) -> None:
        self.by_module: dict[str, list[Tensor]] = {}  # a [B*S] for each micro-batch

    def note(self, name: str, output: Any) -> None:
        """Keep a module's output, unless the backward pass only recomputes it."""
        if torch._C._current_graph_task_id() != -1:
            return
        states = state_of(output).detach().flatten(0, -2)
        generator = torch.Generator().manual_seed(0)
        direction = torch.empty(states.shape[-1], dtype=torch.float64)
        direction.normal_(generator=generator)
        kept = states.double() @ direction.to(states.device)
        self.by_module.setdefault(name, []).append(kept.float().cpu())


@contextmanager
def watch_forward(model: Transformer) -> Iterator[ForwardStates]:
    """The states of all forward passes inside the context."""
    states = ForwardStates()
    handles = []
    in_halves = []
    for name, module in model.named_modules():
        if isinstance(module, WATCHED) or name == FINAL_NORM:
            handles.append(module.register_forward_hook(partial(_note, states, name)))
        if isinstance(module, MoE) and module.in_halves:  # its forward is not called then
            vars(module)["steps"] = partial(_note_steps, states, name, module.steps)
            in_halves.append(module)
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
        for module in in_halves:
            del vars(module)["steps"]


def _note(states: ForwardStates, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
    states.note(name, output)


def _note_steps(
    states: ForwardStates, name: str, steps: Callable[..., Steps[MoEOutput]], *inputs: Any
) -> Steps[MoEOutput]:
    output = yield from steps(*inputs)
    states.note(name, output)
    return output


def state_of(output: Any) -> Tensor:
    """The tensor [..., D] in a module's output."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output.scores if hasattr(output, "scores") else output.hidden
    return found
