"""Drawing the next token from logits.

B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    #: Divides the logits; 0 always takes the likeliest token.
    temperature: float = 0.8
    #: Tokens are drawn from this many likeliest ones; null draws from all.
    top_k: int | None = None
    #: Tokens are drawn from the likeliest ones that make up this share of the probability.
    top_p: float = 0.95
    #: Decides what is drawn; each prompt is drawn for with this seed, whatever its neighbours.
    seed: int = 0


def check_sampling(config: SamplingConfig) -> None:
    """Refuse, with a ValueError, settings under which nothing can be drawn."""
    if config.temperature < 0:
        raise ValueError(f"temperature={config.temperature} must not be negative; 0 is greedy")
    if config.top_k is not None and config.top_k < 1:
        raise ValueError(f"top_k={config.top_k} must be at least 1, or null for all tokens")
    if not 0 < config.top_p <= 1:
        raise ValueError(f"top_p={config.top_p} must lie in (0, 1]; 1 keeps all tokens")


def draw(
    logits: Float[Tensor, "B V"], uniform: Float64[Tensor, " B"], config: SamplingConfig
) -> Int64[Tensor, " B"]:
    """A token per row: the one on which `uniform`, in [0, 1), falls among those that are kept.

    The temperature comes first, then `top_k`, then `top_p` of what that has left. Tokens lie in
    the order of their probability, so that a rounding error in the logits rarely changes a draw.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    vocab_size = logits.shape[-1]
    likeliest = logits.topk(min(config.top_k or vocab_size, vocab_size))
    probabilities = (likeliest.values.double() / config.temperature).softmax(dim=-1)
    is_kept = probabilities.cumsum(dim=-1) - probabilities < config.top_p  # always the first
    ends = probabilities.where(is_kept, 0.0).cumsum(dim=-1)
    places = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True)
    places = places.minimum(is_kept.sum(dim=-1, keepdim=True) - 1)  # a product may round up
    return likeliest.indices.gather(1, places)[:, 0]
