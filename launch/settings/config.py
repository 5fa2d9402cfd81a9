"""The config of `thrifty train` and `thrifty launch`: the run, and how its ranks are started.

One class per way of starting them; `kind` tells them apart in a resolved YAML file.
"""

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from data.config import DATA_KINDS
from launch.nodes.hosts import Host, check_host_keys, find_hosts
from launch.survive.supervision import DoctorConfig, SupervisionConfig, check_supervision
from model.config import MODEL_KINDS
from train.config import RunConfig, check_run
from train.grow.config import GrowChoices
from train.schedule import SCHEDULE_KINDS


@dataclass(slots=True, kw_only=True)
class LaunchConfig:
    #: How ranks are started; set by the group's option.
    kind: str = "local"
    #: Machines that take part.
    nodes: int = 1
    #: Ranks to start on each node, one process each; on GPUs at most one per visible device.
    processes: int = 1
    #: CPU threads of each rank; null shares a node's cores out evenly.
    threads_per_process: int | None = None
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.processes

    @property
    def grace_seconds(self) -> float:
        """Seconds that ranks get to save after they were asked to stop."""
        return self.supervision.grace_seconds


@dataclass(slots=True, kw_only=True)
class LocalLaunch(LaunchConfig):
    """Ranks on this machine, by DeepSpeed's launcher."""

    kind: str = "local"


@dataclass(slots=True, kw_only=True)
class HostsLaunch(LaunchConfig):
    """Machines known by name; those beyond `nodes` are spares."""

    #: Names or addresses of the nodes; `name:slots` where a node has other than `processes` slots.
    hosts: list[str] = field(default_factory=list)
    #: Instead of hosts: a file with a line `name slots=N` for each node, as DeepSpeed reads it.
    hostfile: str | None = None
    #: Python on the nodes; null: this one's path.
    python: str | None = None
    #: Network interface of the nodes that ranks talk over; null: the one that leads to the first.
    interface: str | None = None
    #: Port on the first node at which ranks meet; null: a free one for each attempt.
    port: int | None = None

    def list_hosts(self) -> list[Host]:
        """The hosts in order of preference.

        Raises:
            ValueError: A name is no host's, stands twice, or the file can't be read.
        """
        return find_hosts(self.hosts, self.hostfile, processes=self.processes)


@dataclass(slots=True, kw_only=True)
class SshLaunch(HostsLaunch):
    """Nodes reached by ssh, each with an agent of ours that starts and watches its ranks."""

    kind: str = "ssh"
    #: Configuration file of the ssh client; null: the user's own.
    ssh_config: str | None = None


@dataclass(slots=True, kw_only=True)
class PdshLaunch(HostsLaunch):
    """DeepSpeed's own launcher over pdsh."""

    kind: str = "pdsh"


@dataclass(slots=True, kw_only=True)
class OpenMPILaunch(HostsLaunch):
    """Ranks started by Open MPI's mpirun, as DeepSpeed's openmpi launcher does."""

    kind: str = "openmpi"


@dataclass(slots=True, kw_only=True)
class SlurmLaunch(LaunchConfig):
    """A job of Slurm's: srun starts the ranks, the job requeues itself."""

    kind: str = "slurm"
    #: Partition; null: the cluster's default.
    partition: str | None = None
    #: Account that the job is charged to; null: the user's default.
    account: str | None = None
    #: Time limit as Slurm writes it (`2-00:00:00`); null: the partition's.
    time: str | None = None
    #: Cores of each rank; null: as many as threads_per_process, or Slurm's default.
    cpus_per_process: int | None = None
    #: GPUs of each node; null: as many as processes where this machine has GPUs, else none.
    gpus_per_node: int | None = None
    #: Seconds before the time limit at which ranks are told to save.
    save_seconds: int = 120
    #: Further lines for the script's head, such as `--constraint=h100` or `--mem=0`.
    options: list[str] = field(default_factory=list)
    #: Network interface of the nodes that ranks talk over; null: the one that leads to the first.
    interface: str | None = None

    @property
    def grace_seconds(self) -> float:
        """No longer than until the time limit, at which Slurm ends them and the job."""
        return min(self.supervision.grace_seconds, self.save_seconds)


@dataclass(slots=True, kw_only=True)
class TorchrunLaunch(LaunchConfig):
    """The cluster starts the ranks itself (torchrun, Kubernetes): only the folder is prepared."""

    kind: str = "torchrun"
    #: HOST:PORT at which the nodes' torchruns meet.
    rendezvous: str = "localhost:29400"


LAUNCH_KINDS: dict[str, type[LaunchConfig]] = {
    "local": LocalLaunch,
    "ssh": SshLaunch,
    "pdsh": PdshLaunch,
    "openmpi": OpenMPILaunch,
    "slurm": SlurmLaunch,
    "torchrun": TorchrunLaunch,
}


@dataclass(slots=True, kw_only=True)
class LaunchedRun(RunConfig):
    KINDS: ClassVar[dict[str, dict[str, Any]]] = {**RunConfig.KINDS, "launch": LAUNCH_KINDS}

    #: How the run's ranks are started; may differ from one start of a run to the next.
    launch: LaunchConfig
    grow: GrowChoices = field(default_factory=GrowChoices)


def check_launched(config: LaunchedRun) -> None:
    """Refuse, with a ValueError naming key, value, rule and way out, what can't be started."""
    launch = config.launch
    for name in ("nodes", "processes", "threads_per_process"):
        value = getattr(launch, name)
        if value is not None and value < 1:
            raise ValueError(f"launch.{name}={value} must be at least 1")
    # The kind of a section is its group's choice; `schedule.kind=wsd` alone would lie.
    for group, section, kinds in (
        ("model", config.model, MODEL_KINDS),
        ("data", config.data, DATA_KINDS),
        ("schedule", config.schedule, SCHEDULE_KINDS),
        ("launch", launch, LAUNCH_KINDS),
    ):
        if kinds.get(section.kind) is not type(section):
            raise ValueError(
                f"{group}.kind={section.kind} can't be set by itself; choose {group}=NAME, "
                f"NAME one of {', '.join(kinds)}"
            )
    check_supervision(launch.supervision)
    match launch:
        case LocalLaunch():
            _check_local(launch)
        case HostsLaunch():
            _check_hosts(launch)
        case SlurmLaunch():
            _check_slurm(launch)
        case TorchrunLaunch():
            _check_torchrun(launch)
    check_run(config, num_ranks=launch.num_ranks)


def threads_of(launch: LaunchConfig) -> int:
    """CPU threads for each rank: as configured, or an even share of the usable cores."""
    cores = len(os.sched_getaffinity(0))
    return launch.threads_per_process or max(cores // launch.processes, 1)


def _check_local(launch: LocalLaunch) -> None:
    if launch.nodes != 1:
        raise ValueError(
            f"launch.nodes={launch.nodes}, but launch=local starts ranks on this machine only; "
            "choose launch=ssh or launch=slurm, or launch.nodes=1"
        )
    num_gpus = torch.cuda.device_count()
    if num_gpus and launch.processes > num_gpus:
        raise ValueError(
            f"launch.processes={launch.processes} exceeds the {num_gpus} visible GPUs; choose "
            f"launch.processes <= {num_gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES=''"
        )


def _check_hosts(launch: HostsLaunch) -> None:
    check_host_keys(launch.hosts, launch.hostfile)
    hosts = launch.list_hosts()
    if len(hosts) < launch.nodes:
        raise ValueError(
            f"launch.nodes={launch.nodes}, but only {len(hosts)} hosts are given "
            f"({', '.join(host.name for host in hosts)}); name more or choose fewer nodes"
        )
    for host in hosts:
        if host.slots < launch.processes:
            raise ValueError(
                f"host {host.name} has slots={host.slots}, fewer than launch.processes="
                f"{launch.processes}; give it that many, take it out, or start fewer ranks per node"
            )
    if launch.port is not None and not 1024 <= launch.port <= 65535:
        raise ValueError(f"launch.port={launch.port} must lie between 1024 and 65535, or be null")
    if launch.interface is not None:
        _check_word("launch.interface", launch.interface)


def _check_slurm(launch: SlurmLaunch) -> None:
    for name in ("partition", "account", "time", "interface"):
        value = getattr(launch, name)
        if value is not None:
            _check_word(f"launch.{name}", value)
    for line in launch.options:
        if not line.startswith("--") or not line.isprintable():
            raise ValueError(
                f"launch.options: {line!r} is no option of sbatch; each begins with -- and is one "
                "line, such as --mem=0"
            )
    if launch.save_seconds < 1:
        raise ValueError(f"launch.save_seconds={launch.save_seconds} must be at least 1")


def _check_torchrun(launch: TorchrunLaunch) -> None:
    host, _, port = launch.rendezvous.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"launch.rendezvous={launch.rendezvous} must be HOST:PORT, such as node1:29400"
        )


def _check_word(key: str, value: str) -> None:
    """One word that no shell and no script can read as anything else."""
    if not value or not all(c.isalnum() or c in "._:@+-," for c in value) or value[0] == "-":
        raise ValueError(
            f"{key}={value!r} must be one word of letters, digits and ._:@+-, not beginning with -"
        )
