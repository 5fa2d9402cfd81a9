"""Causal softmax attention inside documents, and what every kind of attention is asked for.

B batch, S new tokens, T tokens held by a cache, H query heads, G key-value heads (a divisor of H),
K query/key width, V value width. A batch is read as B*S consecutive tokens; `segments` are the
lengths of the runs that may see each other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from model.recompute import rebuild


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
    rows run as one batch, and borders inside rows cut the work into one product per segment.
    """
    batch_size, seq_len = query.shape[:2]
    if segments == [seq_len] * batch_size:
        return _causal(query, key, value, scale=scale)
    rows = [tensor.flatten(0, 1).split(segments) for tensor in (query, key, value)]
    mixed = [
        _causal(q[None], k[None], v[None], scale=scale)[0] for q, k, v in zip(*rows, strict=True)
    ]
    return torch.cat(mixed).unflatten(0, (batch_size, seq_len))


def _causal(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention of whole rows, shapes as in `attend`."""
    value_dim = value.shape[-1]
    if value.device.type == "cpu":
        # The CPU's flash kernel wants equal widths; without them torch takes the dense path.
        value = rebuild(F.pad, value, (0, query.shape[-1] - value_dim))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    is_grouped = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped
    )
    return mixed.transpose(1, 2)[..., :value_dim]


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
