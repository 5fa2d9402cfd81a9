"""Ways to start one attempt's ranks: on this machine, over ssh, or by somebody else's launcher."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from queue import Queue
from typing import NamedTuple, Protocol

from launch.nodes.interface import address_of, address_towards
from launch.nodes.link import AgentLink, Event, Hear, JobLink, Link
from launch.nodes.node_ranks import INTERFACE_VARIABLES, LOOPBACK, free_port, module_environment
from launch.nodes.order import RUN_VARIABLE, Order, encode, passed_environment
from launch.nodes.ssh import ask_all, remote_command
from launch.settings.config import (
    HostsLaunch,
    LaunchConfig,
    OpenMPILaunch,
    PdshLaunch,
    SlurmLaunch,
    SshLaunch,
)
from launch.start.job_commands import (
    mpirun_command,
    pdsh_command,
    pdsh_environment,
    pdsh_files,
    srun_command,
)
from train.watch.stall import ATTEMPT_VARIABLE

SIGNAL_SECONDS = 30.0  # for a word to ranks behind somebody else's launcher


class Ready(NamedTuple):
    """A node that answers, and where the ranks would meet on it."""

    host: str
    address: str
    port: int


class Attempt(NamedTuple):
    """What one start needs to know."""

    run_dir: Path
    run_id: str
    number: int
    nodes: list[Ready]
    launch: LaunchConfig

    @property
    def hosts(self) -> list[str]:
        return [node.host for node in self.nodes]

    def hosts_of(self, ranks: list[int]) -> list[str]:
        """Where these ranks are."""
        return [self.nodes[rank // self.launch.processes].host for rank in ranks]


class Starter(Protocol):
    def find_ready(self) -> list[Ready]: ...

    def start(self, attempt: Attempt, events: "Queue[Event]", hear: Hear) -> list[Link]: ...

    def commands(self, attempt: Attempt) -> list[list[str]]: ...


class LocalStarter:
    """One agent on this machine."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch

    def find_ready(self) -> list[Ready]:
        return [Ready("localhost", LOOPBACK, free_port())]

    def start(self, attempt: Attempt, events: "Queue[Event]", hear: Hear) -> list[Link]:
        return _start_agents(self.commands(attempt), attempt, events, hear)

    def commands(self, attempt: Attempt) -> list[list[str]]:  # noqa: ARG002 (one for all)
        return [[sys.executable, "-u", "-m", "launch.nodes.bound", "launch.nodes.agent"]]


class SshStarter:
    """An agent on each node, behind ssh."""

    def __init__(self, launch: SshLaunch) -> None:
        self.launch = launch

    def find_ready(self) -> list[Ready]:
        """The hosts that answer, in the order in which they are listed, spares included."""
        launch = self.launch
        names = [host.name for host in launch.list_hosts()]
        answers = ask_all(launch, names, "launch.nodes.hello", [launch.interface or ""], seconds=30)
        return [
            Ready(name, str(answer["address"]), launch.port or int(answer["port"]))
            for name, answer in zip(names, answers, strict=True)
            if answer.get("address") and answer.get("port")
        ]

    def start(self, attempt: Attempt, events: "Queue[Event]", hear: Hear) -> list[Link]:
        return _start_agents(self.commands(attempt), attempt, events, hear)

    def commands(self, attempt: Attempt) -> list[list[str]]:
        agent = "launch.nodes.agent"
        return [remote_command(self.launch, node.host, agent) for node in attempt.nodes]


class JobStarter:
    """All ranks behind one command of DeepSpeed's, MPI's or Slurm's."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch

    def find_ready(self) -> list[Ready]:
        match self.launch:
            case SlurmLaunch():
                return _find_allocated(self.launch)
            case HostsLaunch() as launch:
                hosts = launch.list_hosts()
                address = hosts[0].name.rpartition("@")[2]
                return [Ready(host.name, address, launch.port or free_port("")) for host in hosts]
            case _:
                raise AssertionError(f"no job for launch={self.launch.kind}")

    def start(self, attempt: Attempt, events: "Queue[Event]", hear: Hear) -> list[Link]:
        (command,) = self.commands(attempt)
        first = attempt.nodes[0]
        extra: dict[str, str] = {}
        if isinstance(self.launch, PdshLaunch):
            environment = job_environment(attempt)
            files = pdsh_files(self.launch, attempt.run_dir, attempt.hosts, environment)
            for path, text in files.items():
                path.write_text(text)
            extra = pdsh_environment(attempt.run_dir)
        extra |= {"MASTER_ADDR": first.address, "MASTER_PORT": str(first.port)}
        process = _open(command, job_environment(attempt) | extra, stdin=subprocess.DEVNULL)
        if isinstance(self.launch, HostsLaunch):
            signal_ranks = partial(_signal_nodes, self.launch, attempt, process)
        else:
            signal_ranks = partial(_signal_step, process)
        return [JobLink(attempt.hosts, process, events, hear, signal_ranks=signal_ranks)]

    def commands(self, attempt: Attempt) -> list[list[str]]:
        hosts, first = attempt.hosts, attempt.nodes[0]
        match self.launch:
            case SlurmLaunch():
                return [srun_command(self.launch, attempt.run_dir, hosts)]
            case OpenMPILaunch():
                names = {*job_environment(attempt), "MASTER_ADDR", "MASTER_PORT"}
                return [mpirun_command(self.launch, attempt.run_dir, hosts, names)]
            case PdshLaunch():
                command = pdsh_command(
                    attempt.run_dir, hosts, address=first.address, port=first.port
                )
                return [command]
            case _:
                raise AssertionError(f"no job for launch={self.launch.kind}")


def build_starter(launch: LaunchConfig) -> Starter:
    """The starter of the launch's kind."""
    match launch:
        case SshLaunch():
            return SshStarter(launch)
        case PdshLaunch() | OpenMPILaunch() | SlurmLaunch():
            return JobStarter(launch)
        case _:
            return LocalStarter(launch)


def build_order(attempt: Attempt, node: int) -> Order:
    """What the agent of a node is told."""
    launch = attempt.launch
    first = attempt.nodes[0]
    is_local = first.address == LOOPBACK
    return Order(
        run_dir=str(attempt.run_dir),
        run_id=attempt.run_id,
        attempt=attempt.number,
        hosts=attempt.hosts,
        node=node,
        processes=launch.processes,
        address=first.address,
        port=first.port,
        interface="lo" if is_local else getattr(launch, "interface", None),
        threads=launch.threads_per_process,
        lost_after_seconds=launch.supervision.lost_after_seconds,
        grace_seconds=launch.supervision.grace_seconds,
        environment=passed_environment(),
    )


def job_environment(attempt: Attempt) -> dict[str, str]:
    """What every rank of a job is told: its attempt, and the config's interface and threads."""
    launch = attempt.launch
    environment = {RUN_VARIABLE: attempt.run_id, ATTEMPT_VARIABLE: str(attempt.number)}
    interface = getattr(launch, "interface", None)
    if interface is not None:
        environment |= dict.fromkeys(INTERFACE_VARIABLES, interface)
    if launch.threads_per_process is not None:
        environment["OMP_NUM_THREADS"] = str(launch.threads_per_process)
    return environment


def _signal_nodes(
    launch: HostsLaunch, attempt: Attempt, process: subprocess.Popen[str], word: str
) -> None:
    """`stop` or `kill` for an attempt's ranks, on every node that can be reached."""
    arguments = [str(attempt.run_dir), attempt.run_id, word]
    ask_all(launch, attempt.hosts, "launch.nodes.signal_ranks", arguments, seconds=SIGNAL_SECONDS)
    if word == "kill":
        process.kill()


def _signal_step(process: subprocess.Popen[str], word: str) -> None:
    """The same by Slurm. SIGTERM makes srun kill its ranks at once; scancel's lets them save."""
    if word == "kill":
        process.terminate()
    else:
        command = ["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]]  # to all but this script
        subprocess.run(command, check=False)  # noqa: S603 (a list, no shell)


def _start_agents(
    commands: list[list[str]], attempt: Attempt, events: "Queue[Event]", hear: Hear
) -> list[Link]:
    links: list[Link] = []
    for node, command in enumerate(commands):
        process = _open(command, {}, stdin=subprocess.PIPE)
        link = AgentLink(attempt.nodes[node].host, process, events, hear)
        link.say(encode(build_order(attempt, node)))
        links.append(link)
    return links


def _open(command: list[str], environment: dict[str, str], *, stdin: int) -> subprocess.Popen[str]:
    """The process, with what it prints as lines of text."""
    return subprocess.Popen(  # noqa: S603 (a list, no shell)
        command,
        env={**os.environ, **module_environment(), **environment},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # the terminal's Ctrl-C reaches this process alone
    )


def _find_allocated(launch: SlurmLaunch) -> list[Ready]:
    """The nodes of the job that this process is in; it runs on the first of them.

    Raises:
        OSError: This node has no such interface, or no way to the others.
    """
    listing = subprocess.run(  # noqa: S603 (a list, no shell)
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    )
    hosts = listing.stdout.split()
    # Its own name may resolve to a loopback address here; the way to a neighbour tells better.
    address: str | None = LOOPBACK
    if launch.interface is not None:
        address = address_of(launch.interface)
    elif len(hosts) > 1:
        address = address_towards(hosts[1])
    if address is None:
        raise OSError(f"launch.interface={launch.interface}: {hosts[0]} has no such interface")
    return [Ready(host, address, free_port("")) for host in hosts]
