"""What generation remembers of past tokens.

B batch, S new tokens, T tokens held. What a token leaves is the attention's choice: a latent and a
rotated key (MLA), or keys and values of its heads (GQA).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class Held(NamedTuple):
    """Views of all that one layer holds."""

    first: Float[Tensor, "B T ..."]
    second: Float[Tensor, "B T ..."]


class Cache:
    """One layer's two tensors, in storage allocated once for `capacity` tokens."""

    def __init__(self, *, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._storage: Held | None = None

    def extend(self, first: Float[Tensor, "B S ..."], second: Float[Tensor, "B S ..."]) -> Held:
        """All that is held after appending the new tokens."""
        if self._storage is None:
            self._storage = Held(*(self._allocate(tensor) for tensor in (first, second)))
        start, self.length = self.length, self.length + first.shape[1]
        assert self.length <= self.capacity, "the caller sizes the cache for all its tokens"
        for storage, new in zip(self._storage, (first, second), strict=True):
            storage[:, start : self.length] = new
        return Held(*(storage[:, : self.length] for storage in self._storage))

    def forget(self, count: int) -> None:
        """Drop the newest tokens."""
        assert 0 <= count <= self.length
        self.length -= count

    def shift(self, places: Int64[Tensor, " B"]) -> None:
        """Move each row's tokens to the right, or to the left where `places` is negative.

        What moves out at one end is lost; what comes in at the other means nothing.
        """
        assert self._storage is not None, "there is something to move"
        sources = torch.arange(self.length, device=places.device) - places[:, None]
        sources = sources.clamp(0, self.length - 1)  # [B, T]
        rows = torch.arange(len(places), device=places.device)[:, None]
        for storage in self._storage:
            storage[:, : self.length] = storage[rows, sources]

    def nbytes(self) -> int:
        """Bytes of storage, held or free."""
        return 0 if self._storage is None else sum(tensor.nbytes for tensor in self._storage)

    def _allocate(self, like: Tensor) -> Tensor:
        return like.new_empty(like.shape[0], self.capacity, *like.shape[2:])
