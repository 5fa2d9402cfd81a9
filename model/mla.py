"""Multi-head latent attention (arXiv:2405.04434, 2.1).

B batch, S sequence, T tokens held by the cache, D model width, H heads, C latent width,
N and R the widths of a head's parts without and with position, V its value width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from model.attention import AttentionConfig, hide_future
from model.cache import Cache
from model.fp8_linear import Kept
from model.linear import Linear
from model.norm import RMSNorm
from model.recompute import rebuild
from model.rope import Rotation, join_turned, rotate_pairs, turn_tail
from model.sequences import Sequences


@dataclass(slots=True, kw_only=True)
class MLAConfig(AttentionConfig):
    #: Width of the compressed query; null projects queries straight from the hidden state.
    q_lora_rank: int | None = None
    #: Width of the latent that keys and values are rebuilt from (all that the cache holds).
    kv_lora_rank: int
    #: Width of the part of a head's query and key that carries no position.
    nope_head_dim: int
    #: Width of the part of a head's query and key that RoPE turns; the key's is shared by heads.
    rope_head_dim: int
    #: Width of a head's value.
    v_head_dim: int

    @property
    def rotated_dim(self) -> int:
        return self.rope_head_dim

    @property
    def product_dims(self) -> int:
        return self.num_heads * (self.nope_head_dim + self.rope_head_dim + self.v_head_dim)


class MLA(nn.Module):
    """Attention whose keys and values are rebuilt from one small latent per token."""

    def __init__(
        self,
        config: MLAConfig,
        *,
        dim: int,
        norm_eps: float,
        temperature: float,
        sequences: Sequences,
    ) -> None:
        super().__init__()
        self.sequences = sequences
        self.num_heads = config.num_heads
        self.nope_head_dim = config.nope_head_dim
        self.rope_head_dim = config.rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        head_dim = config.nope_head_dim + config.rope_head_dim
        self.scale = head_dim**-0.5 * temperature

        query_width = config.num_heads * head_dim
        self.q_down: Linear | None = None
        if config.q_lora_rank is None:
            self.q_up = Linear(dim, query_width)
        else:
            self.q_down = Linear(dim, config.q_lora_rank)
            self.q_norm = RMSNorm(config.q_lora_rank, eps=norm_eps)
            self.q_up = Linear(config.q_lora_rank, query_width)
        self.kv_down = Linear(dim, config.kv_lora_rank + config.rope_head_dim)
        self.kv_norm = RMSNorm(config.kv_lora_rank, eps=norm_eps)
        self.kv_up = Linear(
            config.kv_lora_rank,
            config.num_heads * (config.nope_head_dim + config.v_head_dim),
        )
        self.out = Linear(config.num_heads * config.v_head_dim, dim, kept=Kept.e5m6)

    def forward(
        self, x: Float[Tensor, "B S D"], rotation: Rotation, *, segments: list[int]
    ) -> Float[Tensor, "B S D"]:
        """Training's form: keys and values of every head are rebuilt from the latent."""
        query, key, value = rebuild(self._project_up, *self._project_down(x), rotation)
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
        """Generation's form: attention in the latent space, over the cache and then `x` itself.

        The key's and value's up-projections are absorbed into the query and the output, so that
        no key or value of a past token is ever rebuilt. `hidden_keys` marks padding in the cache.
        """
        q_down, kv_down = self._project_down(x)
        query, (latent, k_rope) = self._queries(q_down), self._latents(kv_down)
        q_nope, q_rope = query.split((self.nope_head_dim, self.rope_head_dim), dim=-1)
        q_rope, k_rope = (rotate_pairs(part, rotation) for part in (q_rope, k_rope))
        latents, k_ropes = cache.extend(latent, k_rope[:, :, 0])  # [B, T, C], [B, T, R]
        up = self.kv_up.weight.unflatten(0, (self.num_heads, -1))
        key_up, value_up = up.split((self.nope_head_dim, self.v_head_dim), dim=1)

        q_latent = torch.einsum("bshn,hnc->bshc", q_nope, key_up)
        logits = torch.einsum("bshc,btc->bhst", q_latent, latents)
        logits = logits + torch.einsum("bshr,btr->bhst", q_rope, k_ropes)
        hidden = hide_future(*logits.shape[-2:], hidden_keys=hidden_keys, device=x.device)
        logits = (logits.float() * self.scale).masked_fill(hidden, float("-inf"))
        weights = logits.softmax(dim=-1).to(x.dtype)
        mixed = torch.einsum("bhst,btc->bshc", weights, latents)
        return self.out(torch.einsum("bshc,hvc->bshv", mixed, value_up).flatten(-2))

    def _project_down(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What queries, and what keys and values, are made of: compressed, not yet normalised."""
        return x if self.q_down is None else self.q_down(x), self.kv_down(x)

    def _project_up(
        self, q_down: Tensor, kv_down: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key [B, S, H, N + R] and value [B, S, H, V]."""
        query = turn_tail(self._queries(q_down), rotation)
        latent, k_rope = self._latents(kv_down)
        up = self.kv_up(latent).unflatten(-1, (self.num_heads, -1))
        k_nope, value = up.split((self.nope_head_dim, self.v_head_dim), dim=-1)
        return query, join_turned(k_nope, k_rope, rotation), value

    def _queries(self, q_down: Tensor) -> Tensor:
        """Queries [B, S, H, N + R], their last R not yet turned."""
        hidden = q_down if self.q_down is None else self.q_norm(q_down)
        return self.q_up(hidden).unflatten(-1, (self.num_heads, -1))

    def _latents(self, kv_down: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised latent [B, S, C], and what all heads' keys share [B, S, 1, R], not yet
        turned."""
        latent, k_rope = kv_down.split((self.kv_lora_rank, self.rope_head_dim), dim=-1)
        return self.kv_norm(latent), k_rope.unsqueeze(2)


def check_mla(config: MLAConfig) -> None:
    """Refuse, with a ValueError, widths that are not positive."""
    widths = ("num_heads", "kv_lora_rank", "nope_head_dim", "rope_head_dim", "v_head_dim")
    for name in (*widths, "q_lora_rank"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"model.attention.{name}={value} must be positive; choose at least 1")
    if config.v_head_dim > config.nope_head_dim + config.rope_head_dim:
        raise ValueError(
            f"model.attention.v_head_dim={config.v_head_dim} exceeds the query's width "
            f"{config.nope_head_dim + config.rope_head_dim} (nope_head_dim + rope_head_dim); "
            "choose a v_head_dim up to that"
        )
    if config.rope_head_dim % 2:
        raise ValueError(
            f"model.attention.rope_head_dim={config.rope_head_dim} is odd, but RoPE turns pairs; "
            "choose an even one"
        )
