"""Causal softmax attention inside documents.

B batch, S sequence, H heads, K query/key width, V value width. A batch is read as B*S
consecutive tokens; `segments` are the lengths of the runs that may see each other.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attend(
    query: Float[Tensor, "B S H K"],
    key: Float[Tensor, "B S H K"],
    value: Float[Tensor, "B S H V"],
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
        value = F.pad(value, (0, query.shape[-1] - value_dim))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return mixed.transpose(1, 2)[..., :value_dim]
