"""Gradients added up over ranks, in buckets that may leave while the backward pass makes others.

All ranks begin the buckets in the same order, whichever of them is complete first: the order in
which a backward pass makes gradients, the model's last parameters first.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# A bucket on its way is a copy of its gradients, so further ones wait for the first.
MOST_UNDER_WAY = 2


class Bucket(NamedTuple):
    """Parameters whose gradients travel together, over the ranks that have the same."""

    names: list[str]
    group: dist.ProcessGroup | None  # None: all ranks


class _Sum(NamedTuple):
    """A bucket on its way."""

    gradients: list[Tensor]
    flat: Tensor
    work: dist.Work

    @torch.no_grad()
    def take(self) -> None:
        """Give the gradients the totals. On a GPU its stream waits for them, the host does not."""
        self.work.wait()
        sizes = [gradient.numel() for gradient in self.gradients]
        for gradient, total in zip(self.gradients, self.flat.split(sizes), strict=True):
            gradient.view(-1).copy_(total)


class Reduction:
    """Of one step's gradients. `gradient_of` is asked when a bucket is complete."""

    def __init__(self, buckets: Sequence[Bucket], gradient_of: Callable[[str], Tensor]) -> None:
        self._buckets = buckets
        self._gradient_of = gradient_of
        self._bucket_of = {name: i for i, bucket in enumerate(buckets) for name in bucket.names}
        self._num_missing = [len(bucket.names) for bucket in buckets]
        self._num_begun = 0
        self._under_way: list[_Sum] = []

    def note(self, name: str) -> None:
        """A parameter's gradient is complete: the buckets leave whose turn it is."""
        if name not in self._bucket_of:  # no other rank has the parameter
            return
        self._num_missing[self._bucket_of[name]] -= 1
        while self._num_begun < len(self._buckets) and not self._num_missing[self._num_begun]:
            self._begin()

    def finish(self) -> None:
        """All gradients are complete, and have the totals when this returns."""
        while self._num_begun < len(self._buckets):
            self._begin()
        while self._under_way:
            self._under_way.pop(0).take()

    @torch.no_grad()
    def _begin(self) -> None:
        bucket = self._buckets[self._num_begun]
        self._num_begun += 1
        if len(self._under_way) == MOST_UNDER_WAY:
            self._under_way.pop(0).take()
        gradients = [self._gradient_of(name) for name in bucket.names]
        flat = torch.cat([gradient.view(-1) for gradient in gradients])
        work = dist.all_reduce(flat, group=bucket.group, async_op=True)
        self._under_way.append(_Sum(gradients, flat, work))


def fill_buckets(
    sizes: dict[str, int], group: dist.ProcessGroup | None, *, bucket_size: int
) -> list[Bucket]:
    """Buckets of at least so many elements (but for the rest), the last parameters first.

    No bucket where a rank is the only one that has the parameters.
    """
    if dist.get_world_size(group) == 1:
        return []
    buckets: list[Bucket] = []
    names: list[str] = []
    numel = 0
    for name, size in sizes.items():
        names.append(name)
        numel += size
        if numel >= bucket_size:
            buckets.append(Bucket(names, group))
            names, numel = [], 0
    if names:
        buckets.append(Bucket(names, group))
    return buckets[::-1]
