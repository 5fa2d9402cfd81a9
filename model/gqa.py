"""Grouped-query attention (arXiv:2305.13245): the dense models' attention, as in Llama and Qwen2.

B batch, S sequence, T tokens held by the cache, D model width, H query heads, G key-value heads,
K width of a head.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from model.attention import AttentionConfig, hide_future
from model.cache import Cache
from model.fp8_linear import Kept
from model.linear import Linear
from model.rope import Rotation, rotate_halves
from model.sequences import Sequences


@dataclass(slots=True, kw_only=True)
class GQAConfig(AttentionConfig):
    #: Heads of keys and values, each shared by num_heads / num_kv_heads query heads.
    num_kv_heads: int
    #: Width of a head; RoPE turns all of it.
    head_dim: int
    #: Whether query, key and value projections have a bias (Qwen2).
    qkv_bias: bool = False

    @property
    def rotated_dim(self) -> int:
        return self.head_dim

    @property
    def product_dims(self) -> int:
        return self.num_heads * 2 * self.head_dim


class GQA(nn.Module):
    """Attention whose query heads share fewer key-value heads."""

    def __init__(
        self, config: GQAConfig, *, dim: int, temperature: float, sequences: Sequences
    ) -> None:
        super().__init__()
        self.sequences = sequences
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 * temperature
        kv_width = config.num_kv_heads * config.head_dim
        self.query = Linear(dim, config.num_heads * config.head_dim, bias=config.qkv_bias)
        self.key = Linear(dim, kv_width, bias=config.qkv_bias)
        self.value = Linear(dim, kv_width, bias=config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, dim, kept=Kept.e5m6)

    def forward(
        self, x: Float[Tensor, "B S D"], rotation: Rotation, *, segments: list[int]
    ) -> Float[Tensor, "B S D"]:
        query, key, value = self._project(x, rotation)
        mixed = self.sequences.attend(query, key, value, scale=self.scale, segments=segments)
        return self.out(mixed.flatten(-2))

    def decode(
        self,
        x: Float[Tensor, "B S D"],
        rotation: Rotation,
        cache: Cache,
        *,
        hidden_keys: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B S D"]:
        """Attention over the cache and then `x` itself; `hidden_keys` marks padding in it."""
        query, key, value = self._project(x, rotation)
        keys, values = cache.extend(key, value)  # each [B, T, G, K]
        hidden = hide_future(x.shape[1], keys.shape[1], hidden_keys=hidden_keys, device=x.device)
        query, keys, values = (tensor.transpose(1, 2) for tensor in (query, keys, values))
        mixed = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=~hidden,
            scale=self.scale,
            enable_gqa=True,
        )
        return self.out(mixed.transpose(1, 2).flatten(-2))

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, S, H, K], key and value [B, S, G, K], with positions."""
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.query, self.key, self.value)
        )
        return rotate_halves(query, rotation), rotate_halves(key, rotation), value


def check_gqa(config: GQAConfig) -> None:
    """Refuse, with a ValueError, heads that can't be shared."""
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"model.attention.{name}={value} must be positive; choose at least 1")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"model.attention.num_kv_heads={config.num_kv_heads} does not divide "
            f"model.attention.num_heads={config.num_heads}; choose a divisor"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"model.attention.head_dim={config.head_dim} is odd, but RoPE turns pairs; "
            "choose an even one"
        )
