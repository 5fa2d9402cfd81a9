"""Matrix products with learned weights: which numbers each layer of them multiplies.

A layer here is a module whose products may be taken in FP8: `Linear`, `SwiGLU`, `Experts`. What is
none of these never is: embedding, head, router, norms, the attention itself.
"""

from collections.abc import Iterable

from torch import nn


class Products(nn.Module):
    """A module whose matrix products are taken in FP8, or in the numbers of its input."""

    is_fp8 = False


def product_layers(model: nn.Module) -> dict[str, Products]:
    """Every layer of products by name, in the order of the forward pass."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Products)}


def use_fp8(model: nn.Module, *, but: Iterable[str] = ()) -> None:
    """Take all layers' products in FP8, except those of the layers named in `but`."""
    excepted = frozenset(but)
    for name, layer in product_layers(model).items():
        layer.is_fp8 = name not in excepted
