"""What is observed of a step, as logical tensors: whoever took it, on however many ranks.

Every observation is a `Fragment` named STEP/QUANTITY/NAME.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.router import Router
from model.transformer import Transformer
from train.checkpoint.manifest import Fragment
from train.verify.forward_states import ForwardStates

FORWARD, LOAD, LOSS, GRADIENT, NORM = "forward", "load", "loss", "gradient", "norm"
WEIGHT, BUFFER = "weight", "buffer"
TERM = "term"  # one loss's share of a gradient: not compared, but explains what differs


class Key(NamedTuple):
    step: int  # from 1 on
    quantity: str
    name: str

    def __str__(self) -> str:
        return f"{self.step}/{self.quantity}/{self.name}"


def read_key(name: str) -> Key:
    step, quantity, rest = name.split("/", 2)
    return Key(int(step), quantity, rest)


def keep(key: Key, tensor: Tensor) -> Fragment:
    """A copy of a whole tensor, on the host."""
    data = tensor.detach().flatten().to("cpu", copy=True)
    return Fragment(str(key), tuple(tensor.shape), 0, data)


def keep_fragment(step: int, fragment: Fragment) -> Fragment:
    """A copy of an engine's fragment, whose name begins with its quantity, on the host."""
    data = fragment.data.detach().to("cpu", copy=True)
    return fragment._replace(name=f"{step}/{fragment.name}", data=data)


def keep_load(step: int, load: Tensor, config: ModelConfig) -> Iterator[Fragment]:
    """The counts [L, E] under the routers' names."""
    for name, of_layer in zip(router_names(config), load, strict=True):
        yield keep(Key(step, LOAD, name), of_layer)


def keep_states(
    step: int,
    states: ForwardStates,
    rows: Sequence[Sequence[int]],
    columns: range,
    *,
    shape: tuple[int, int],
) -> Iterator[Fragment]:
    """Forward states: `rows` are each micro-batch's sequences, `columns` the tokens of each one.

    A module may have been given a micro-batch in parts. `shape` is [sequences of the global batch,
    S].
    """
    sequences = [row for of_batch in rows for row in of_batch]
    for name, in_parts in states.by_module.items():
        state = torch.cat(in_parts).unflatten(0, (len(sequences), -1))
        for row, values in zip(sequences, state, strict=True):
            start = row * shape[1] + columns.start
            yield Fragment(str(Key(step, FORWARD, name)), shape, start, values)


def router_names(config: ModelConfig) -> list[str]:
    """Names of the routers in the order of `Sums.load`."""
    with torch.device("meta"):
        model = Transformer(config)
    return [name for name, module in model.named_modules() if isinstance(module, Router)]


def write_observations(path: Path, fragments: Iterable[Fragment]) -> None:
    torch.save([tuple(fragment) for fragment in fragments], path)


def read_observations(paths: Iterable[Path]) -> list[Fragment]:
    """All ranks' observations; their tensors stay in the files until they are read."""
    return [
        Fragment(*values)
        for path in paths
        for values in torch.load(path, mmap=True, weights_only=True)
    ]
