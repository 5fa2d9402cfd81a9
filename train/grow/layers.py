"""Which old layer each new layer comes from."""

from typing import NamedTuple

from model.config import ModelConfig
from train.grow.config import Order


class LayerSource(NamedTuple):
    layer: int
    is_repeat: bool  # the layer that it comes from stands before it already


def layer_sources(old: ModelConfig, new: ModelConfig, *, order: Order) -> list[LayerSource]:
    """One source for each new layer.

    The dense layers at the beginning come from dense ones, the MoE layers from MoE ones and from
    the dense ones that are left (their networks become experts).

    Raises:
        ValueError: Layers would have to vanish, or experts to become dense.
    """
    if new.num_layers < old.num_layers:
        raise ValueError(
            f"model.num_layers={new.num_layers} is less than the run's {old.num_layers}; "
            "thrifty grow repeats layers, it takes none away"
        )
    dense = list(range(min(old.num_dense_layers, new.num_dense_layers)))
    sparse = list(range(len(dense), old.num_layers))
    num_sparse = new.num_layers - new.num_dense_layers
    if new.num_dense_layers > len(dense) and (not dense or num_sparse < len(sparse)):
        raise ValueError(
            f"model.num_dense_layers={new.num_dense_layers} with model.num_layers="
            f"{new.num_layers} would make dense layers of ones with experts; choose "
            f"model.num_dense_layers <= {old.num_dense_layers}"
        )
    if num_sparse < len(sparse):
        raise ValueError(
            f"model.num_layers={new.num_layers} with model.num_dense_layers="
            f"{new.num_dense_layers} has no room for the run's {len(sparse)} other layers; choose "
            f"model.num_layers >= {new.num_dense_layers + len(sparse)}"
        )
    sources = _stretch(dense, new.num_dense_layers, order) + _stretch(sparse, num_sparse, order)
    return [
        LayerSource(layer, is_repeat=layer in sources[:place])
        for place, layer in enumerate(sources)
    ]


def _stretch(layers: list[int], count: int, order: Order) -> list[int]:
    if order is Order.interleave:
        return [layers[place * len(layers) // count] for place in range(count)]
    return [layers[place % len(layers)] for place in range(count)]
