"""Attention inside documents that lie behind each other: no mask exists, each sees only itself.

N tokens in a row, cut into segments; H query heads, G key-value heads, K query/key width, V value
width. On GPUs one kernel takes segments of any lengths, where torch and the device have it; else,
and on CPUs, each segment is a product of its own, and segments of equal length share one.
"""

import inspect
from collections import defaultdict
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from model.recompute import rebuild

WIDEST_FLASH_HEAD = 256


def attend_segments(
    query: Float[Tensor, "N H K"],
    key: Float[Tensor, "N G K"],
    value: Float[Tensor, "N G V"],
    *,
    scale: float,
    segments: list[int],
) -> Float[Tensor, "N H V"]:
    """Each token's mixture of the values at and before it in its own segment."""
    if has_varlen_kernel(query):
        return _by_varlen(query, key, value, scale=scale, segments=segments)
    return _by_length(query, key, value, scale=scale, segments=segments)


def has_varlen_kernel(query: Tensor) -> bool:
    """Whether `varlen_attn` can run here: flash attention, in 16 bits, from Ampere on."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= WIDEST_FLASH_HEAD
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and {"scale", "window_size"} <= _varlen_takes()  # torch before 2.11 had neither
    )


@cache
def _varlen_takes() -> set[str]:
    """The arguments of torch's kernel."""
    from torch.nn.attention.varlen import varlen_attn  # brings sympy: only its users wait for that

    return set(inspect.signature(varlen_attn).parameters)


def _by_varlen(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, segments: list[int]
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    value_dim = value.shape[-1]
    value = rebuild(F.pad, value, (0, query.shape[-1] - value_dim))  # the kernel's one width
    borders, longest = _borders(tuple(segments), query.device), max(segments)
    options: dict[str, Any] = {}
    if "enable_gqa" in _varlen_takes():
        options["enable_gqa"] = key.shape[1] != query.shape[1]
    elif key.shape[1] != query.shape[1]:
        sharing = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(sharing, dim=1) for tensor in (key, value))
    mixed = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # all before, none after: causal
        **options,
    )
    assert isinstance(mixed, Tensor)
    return mixed[..., :value_dim]


@lru_cache(maxsize=8)
def _borders(segments: tuple[int, ...], device: torch.device) -> Tensor:
    """Where segments begin, and the end; all layers of a step ask for the same."""
    return torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device=device)


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, segments: list[int]
) -> Tensor:
    if len(set(segments)) == len(segments):
        rows = [tensor.split(segments) for tensor in (query, key, value)]
        mixed = [
            causal(q[None], k[None], v[None], scale=scale)[0] for q, k, v in zip(*rows, strict=True)
        ]
        return torch.cat(mixed)
    starts: dict[int, list[int]] = defaultdict(list)
    for start, length in zip(accumulate(segments, initial=0), segments, strict=False):
        starts[length].append(start)
    places = torch.cat(
        [
            (torch.tensor(own)[:, None] + torch.arange(length)).flatten()
            for length, own in starts.items()
        ]
    ).to(query.device)
    sizes = [length * len(own) for length, own in starts.items()]
    groups = [tensor[places].split(sizes) for tensor in (query, key, value)]
    mixed = []
    for length, *group in zip(starts, *groups, strict=True):
        batch = (tensor.unflatten(0, (-1, length)) for tensor in group)
        mixed.append(causal(*batch, scale=scale).flatten(0, 1))
    back = torch.empty_like(places)
    back[places] = torch.arange(len(places), device=places.device)
    return torch.cat(mixed)[back]


def causal(
    query: Float[Tensor, "B S H K"],
    key: Float[Tensor, "B S G K"],
    value: Float[Tensor, "B S G V"],
    *,
    scale: float,
) -> Float[Tensor, "B S H V"]:
    """Causal attention of whole rows."""
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
