"""The processes of a run: who this one is, and agreement among all of them on the host."""

import datetime
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Ranks:
    """This process's place among all.

    `control` is a gloo group: agreement on the host, without touching the device. A process
    that is alone needs none.
    """

    rank: int
    count: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[int]) -> list[int]:
        """Element-wise sums over all ranks, exact."""
        if self.control is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def any(self, claim: bool) -> bool:
        """Whether the claim holds on at least one rank."""
        return self.sum([int(claim)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank (plain data only)."""
        if self.control is None:
            return [value]
        values = [value] * self.count
        dist.all_gather_object(values, value, group=self.control)
        return values

    def wait(self) -> None:
        """Return once all ranks are here."""
        self.sum([0])


def read_device() -> torch.device:
    """The accelerator of this process's local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def alone() -> Ranks:
    """A process without others, for work that needs no group."""
    return Ranks(0, 1, read_device())


def connect(*, timeout_minutes: float) -> Ranks:
    """The group's other members found; the default group must be initialised."""
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))
    assert control is not None, "every rank is a member"
    return Ranks(dist.get_rank(), dist.get_world_size(), read_device(), control)
