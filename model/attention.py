"""Causal softmax attention inside documents, and what every kind of attention is asked for.

B batch, S new tokens, T tokens held by a cache, H query heads, G key-value heads (a divisor of H),
K query/key width, V value width. A batch is read as B*S consecutive tokens; `segments` are the
lengths of the runs that may see each other.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.segments import attend_segments, causal


@dataclass(slots=True, kw_only=True)
class AttentionConfig:
    """What the rest of the model needs to know of any attention."""

    #: Attention heads.
    num_heads: int

    @property
    def rotated_dim(self) -> int:
        """Width of the part of a head that RoPE turns."""
        raise TypeError("an attention of no kind")

    @property
    def product_dims(self) -> int:
        """Widths of query-key and weight-value products, over all heads: half the FLOPs per
        pair of tokens."""
        raise TypeError("an attention of no kind")


def attend(
    query: Float[Tensor, "B S H K"],
    key: Float[Tensor, "B S G K"],
    value: Float[Tensor, "B S G V"],
    *,
    scale: float,
    segments: list[int],
) -> Float[Tensor, "B S H V"]:
    """Each token's mixture of the values at and before it in its own segment.

    `segments` sum to B*S and none crosses a row's end. No mask is ever materialised: whole
    rows run as one batch, and borders inside rows cut the work (`model/segments.py`).
    """
    batch_size, seq_len = query.shape[:2]
    if segments == [seq_len] * batch_size:
        return causal(query, key, value, scale=scale)
    flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
    mixed = attend_segments(*flat, scale=scale, segments=segments)
    return mixed.unflatten(0, (batch_size, seq_len))


def hide_future(
    num_new: int,
    num_held: int,
    *,
    hidden_keys: Bool[Tensor, "B T"] | None,
    device: torch.device,
) -> Bool[Tensor, "#B 1 S T"]:
    """Which of the held keys each new token must not see: later ones, and hidden ones.

    A hidden token itself sees its own key: a row of nothing would be a row of NaN.
    """
    keys = torch.arange(num_held, device=device)
    places = keys[num_held - num_new :, None]
    hidden = (keys > places)[None, None]
    if hidden_keys is not None:
        hidden = hidden | (hidden_keys[:, None, None, :] & (keys != places))
    return hidden
