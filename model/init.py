"""Initial weights: one table, and values that do not depend on the layout.

Each tensor, and each expert of a stack, draws from a generator of its own, seeded by the run's
seed and its logical name: any number of ranks starts from the same model.
"""

import hashlib
import re

import torch
from torch import Tensor, nn

from model.experts import Experts

ONES = "ones"
NORMAL = "normal"  # mean 0, standard deviation model.init_std (arXiv:2412.19437, 4.2: all weights)

TABLE: tuple[tuple[str, str], ...] = (  # the first pattern found in a parameter's name counts
    (r"(^|\.|_)norm\.weight$", ONES),
    (r".", NORMAL),
)


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int, std: float) -> None:
    """Fill every parameter in place by TABLE; buffers keep what their modules set."""
    firsts = first_experts(model)
    for name, parameter in model.named_parameters():
        value = initial_value(
            name, parameter.shape, seed=seed, std=std, first_expert=firsts.get(name)
        )
        parameter.copy_(value)


def initial_value(
    name: str, shape: torch.Size, *, seed: int, std: float, first_expert: int | None = None
) -> Tensor:
    """The fp32 value that the parameter `name` starts from.

    A stack of experts names the global index of its first; each expert's part depends on its
    own index alone.
    """
    rule = next(rule for pattern, rule in TABLE if re.search(pattern, name))
    if rule == ONES:
        return torch.ones(shape)
    if first_expert is None:
        return _normal(f"{seed}/{name}", shape, std)
    experts = range(first_expert, first_expert + shape[0])
    return torch.stack([_normal(f"{seed}/{name}/{e}", shape[1:], std) for e in experts])


def first_experts(model: nn.Module) -> dict[str, int]:
    """Global index of the first expert in each stacked expert parameter, by name."""
    return {
        f"{prefix}.{name}": module.first
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    }


def _normal(identity: str, shape: torch.Size, std: float) -> Tensor:
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.empty(shape).normal_(std=std, generator=generator)
