"""Sequences as the layers meet them: whole, or a part of each with the rest on other ranks.

B batch, S tokens of a sequence that are here, H query heads, G key-value heads, K query/key width,
V value width, E experts.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from model.attention import attend


@runtime_checkable
class Sequences(Protocol):
    """The two things for which a layer needs the tokens that are not here."""

    def attend(
        self,
        query: Float[Tensor, "B S H K"],
        key: Float[Tensor, "B S G K"],
        value: Float[Tensor, "B S G V"],
        *,
        scale: float,
        segments: list[int],
    ) -> Float[Tensor, "B S H V"]:
        """`model.attention.attend` over whole sequences, whose lengths `segments` are in."""
        ...

    def total(self, counts: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """Each sequence's counts over all of its tokens; no gradient flows through."""
        ...


class WholeSequences:
    """All tokens of every sequence are here."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, segments: list[int]
    ) -> Tensor:
        return attend(query, key, value, scale=scale, segments=segments)

    def total(self, counts: Tensor) -> Tensor:
        return counts
