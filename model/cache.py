"""What generation remembers of past tokens: one latent per token and layer.

B batch, S new tokens, T tokens held, C latent width, R rotated key width.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Held(NamedTuple):
    latents: Float[Tensor, "B T C"]
    k_ropes: Float[Tensor, "B T R"]


class LatentCache:
    """One layer's latents and rotated keys, in storage allocated once for `capacity` tokens."""

    def __init__(self, *, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._storage: Held | None = None

    def extend(self, latent: Float[Tensor, "B S C"], k_rope: Float[Tensor, "B S R"]) -> Held:
        """Views of all that is held after appending the new tokens."""
        if self._storage is None:
            batch_size = latent.shape[0]
            self._storage = Held(
                latent.new_empty(batch_size, self.capacity, latent.shape[-1]),
                k_rope.new_empty(batch_size, self.capacity, k_rope.shape[-1]),
            )
        start, self.length = self.length, self.length + latent.shape[1]
        assert self.length <= self.capacity, "the caller sizes the cache for all its tokens"
        self._storage.latents[:, start : self.length] = latent
        self._storage.k_ropes[:, start : self.length] = k_rope
        return Held(*(tensor[:, : self.length] for tensor in self._storage))

    @torch.no_grad()
    def nbytes(self) -> int:
        """Bytes of storage, held or free."""
        return 0 if self._storage is None else sum(tensor.nbytes for tensor in self._storage)
