"""A part of the model's blocks, for pipelines: what one stage holds of the whole."""

from itertools import pairwise
from typing import NamedTuple

from model.config import ModelConfig


class Part(NamedTuple):
    """Consecutive blocks. The first part begins with the embedding; the last ends with the final
    norm, the head and MTP, and has the losses."""

    layers: range
    is_first: bool
    is_last: bool


def whole(config: ModelConfig) -> Part:
    """All of the model as one part."""
    return Part(range(config.num_layers), is_first=True, is_last=True)


def cut_blocks(counts: list[int]) -> list[Part]:
    """Parts of so many blocks each, in order."""
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [
        Part(range(start, stop), is_first=i == 0, is_last=i == len(counts) - 1)
        for i, (start, stop) in enumerate(pairwise(starts))
    ]
