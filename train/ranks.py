"""The processes of a run: who this one is, and agreement among all of them on the host."""

import datetime
import os
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor

from model.whereabouts import HERE

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Ranks:
    """This process's place among all.

    `control` is a gloo group: agreement on the host, without touching the device. A process
    that is alone needs none. `background` is another one, for a thread beside the training:
    collectives of one group must not mix. Ranks that work on the same sequences make up a replica
    of the model: consecutive ones, with a part of each sequence each, or one of each stage of a
    pipeline. Otherwise each rank is a replica of its own.
    """

    rank: int
    count: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    background: dist.ProcessGroup | None = None
    parts_per_sequence: int = 1
    pipeline_ranks: int = 1
    sequence_group: dist.ProcessGroup | None = None  # this replica's, where sequences are shared
    pipeline_group: dist.ProcessGroup | None = None  # this replica's, where there are stages
    stage_group: dist.ProcessGroup | None = None  # the ranks with the same stages as this one

    @property
    def ranks_per_replica(self) -> int:
        return self.parts_per_sequence * self.pipeline_ranks

    @property
    def num_replicas(self) -> int:
        return self.count // self.ranks_per_replica

    @property
    def ranks_per_stage(self) -> int:
        """Ranks with the same blocks: consecutive ones."""
        return self.count // self.pipeline_ranks

    @property
    def pipeline_rank(self) -> int:
        """This rank's place in its pipeline."""
        return self.rank // self.ranks_per_stage

    @property
    def replica(self) -> int:
        """The replica that this rank belongs to."""
        return self.rank % self.ranks_per_stage // self.parts_per_sequence

    @property
    def sequence_part(self) -> int:
        """Which part of its replica's sequences this rank has."""
        return self.rank % self.parts_per_sequence

    @property
    def is_first_of_stage(self) -> bool:
        return self.rank % self.ranks_per_stage == 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        return int(os.environ.get("LOCAL_RANK", "0")) == 0

    def beside(self) -> "Ranks":
        """The same ranks as a thread beside the training meets them."""
        return replace(self, control=self.background)

    def sum(self, values: list[int]) -> list[int]:
        """Element-wise sums over all ranks, exact."""
        if self.control is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        with HERE.doing("agreement on the host"):
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
        with HERE.doing("agreement on the host"):
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


def connect(
    *, timeout_minutes: float, parts_per_sequence: int = 1, pipeline_ranks: int = 1
) -> Ranks:
    """The group's other members found; the default group must be initialised."""
    timeout = datetime.timedelta(minutes=timeout_minutes)
    control, background = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    ranks = Ranks(
        dist.get_rank(),
        dist.get_world_size(),
        read_device(),
        control,
        background,
        parts_per_sequence,
        pipeline_ranks,
    )
    every = torch.arange(ranks.count)
    if parts_per_sequence > 1:
        sequences = every.unflatten(0, (-1, parts_per_sequence))
        ranks = replace(ranks, sequence_group=_group_of(ranks.rank, sequences, timeout))
    if pipeline_ranks > 1:
        stages = every.unflatten(0, (pipeline_ranks, -1))
        ranks = replace(
            ranks,
            stage_group=_group_of(ranks.rank, stages, timeout),
            pipeline_group=_group_of(ranks.rank, stages.T, timeout),
        )
    return ranks


def _group_of(
    rank: int, members: Int64[Tensor, "groups ranks"], timeout: datetime.timedelta
) -> dist.ProcessGroup | None:
    """The group that the rank is in, of several that all ranks form together."""
    groups = [dist.new_group(group, timeout=timeout) for group in members.tolist()]
    return groups[int((members == rank).any(dim=1).nonzero())]
