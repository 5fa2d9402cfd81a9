"""The processes of a run: who this one is, and agreement among all of them on the host."""

import datetime
import os
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Ranks:
    """This process's place among all.

    `control` is a gloo group: agreement on the host, without touching the device. A process
    that is alone needs none. `background` is another one, for a thread beside the training:
    collectives of one group must not mix. Ranks that work on the same sequences make up a replica
    of the model; without sequence parallelism each is one of its own.
    """

    rank: int
    count: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    background: dist.ProcessGroup | None = None
    ranks_per_replica: int = 1
    sequence_group: dist.ProcessGroup | None = None  # this replica's ranks, if it has several

    @property
    def replica(self) -> int:
        """The replica that this rank belongs to: consecutive ranks form one."""
        return self.rank // self.ranks_per_replica

    @property
    def place_in_replica(self) -> int:
        return self.rank % self.ranks_per_replica

    @property
    def num_replicas(self) -> int:
        return self.count // self.ranks_per_replica

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def beside(self) -> "Ranks":
        """The same ranks as a thread beside the training meets them."""
        return replace(self, control=self.background)

    def sum(self, values: list[int]) -> list[int]:
        """Element-wise sums over all ranks, exact."""
        if self.control is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def sum_replicas(self, values: list[int]) -> list[int]:
        """Element-wise sums over replicas, exact; the ranks of a replica give the same values."""
        return [value // self.ranks_per_replica for value in self.sum(values)]

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


def connect(*, timeout_minutes: float, ranks_per_sequence: int = 1) -> Ranks:
    """The group's other members found; the default group must be initialised.

    `ranks_per_sequence` consecutive ranks hold a part of each sequence of a replica.
    """
    timeout = datetime.timedelta(minutes=timeout_minutes)
    control, background = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    ranks = Ranks(
        dist.get_rank(),
        dist.get_world_size(),
        read_device(),
        control,
        background,
        ranks_per_replica=ranks_per_sequence,
    )
    if ranks_per_sequence == 1:
        return ranks
    members = torch.arange(ranks.count).unflatten(0, (-1, ranks_per_sequence)).tolist()
    groups = [dist.new_group(sequence, timeout=timeout) for sequence in members]
    return replace(ranks, sequence_group=groups[ranks.replica])
