"""The ranks of one node: started, watched, told to stop.

Several ranks are started by the part of DeepSpeed's launcher that works on one node
(`deepspeed.launcher.launch`); its front end would add the reading of /job/hostfile and ignore
CUDA_VISIBLE_DEVICES. The launcher's exit codes are garbled and its answer to a signal is
SIGKILL after 30 s, so the outcome is read from the run's folder, and signals go to the ranks.
"""

import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

log = logging.getLogger(__name__)

# Seconds that ranks may go on saving after the launcher above them has died.
ORPHANS_GRACE = 60.0
LOOPBACK = "127.0.0.1"
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # over which ranks talk


class World(NamedTuple):
    """The nodes of one start, in order, and where their ranks meet."""

    hosts: list[str]
    node: int  # this one's place among them
    processes: int  # ranks of each
    address: str
    port: int

    @property
    def first_rank(self) -> int:
        return self.node * self.processes


def start_ranks(
    run_dir: Path, world: World, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """This node's ranks in a process group of their own; the process is their launcher's."""
    return subprocess.Popen(  # noqa: S603 (a list, no shell)
        launcher_command(run_dir, world),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # the terminal's Ctrl-C reaches this process alone
    )


class NodeRanks:
    """The run's processes: found, told to stop, ended."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path) -> None:
        self.process = process
        self.run_dir = run_dir
        self.num_signals = 0
        self.is_stopped_early = False  # a signal came before there was a rank to save anything

    def end_orphans(self) -> None:
        """Wait for ranks that outlived their launcher; kill what is left of the run."""
        deadline = time.monotonic() + ORPHANS_GRACE
        while self._ranks() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.kill()

    def kill(self) -> None:
        """End every process of the run on this node at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ask the ranks to save and end; asked a third time, kill them."""
        self.num_signals += 1
        if self.num_signals == 1:
            log.warning("stopping: the ranks finish their step and save")
            # Before there are ranks nothing needs to be saved: the launcher itself may end.
            ranks = self._ranks()
            self.is_stopped_early = not ranks
            for process in ranks or [psutil.Process(self.process.pid)]:
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
        elif self.num_signals == 2:
            log.warning("still saving; once more kills the ranks (the last checkpoint stays)")
        else:
            self.kill()

    def _ranks(self) -> list[psutil.Process]:
        """The ranks themselves, without the launcher above and the workers below them."""
        members = {process.pid: process for process in self._members()}
        ranks = {pid for pid, process in members.items() if is_rank(process, self.run_dir)}
        return [members[pid] for pid in ranks if _parent_pid(members[pid]) not in ranks]

    def _members(self) -> list[psutil.Process]:
        """Living processes of the run: they share a process group, orphans included."""
        members = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError, PermissionError):
                in_group = os.getpgid(process.pid) == self.process.pid
                if in_group and process.status() != psutil.STATUS_ZOMBIE:
                    members.append(process)
        return members


def launcher_command(run_dir: Path, world: World) -> list[str]:
    """One process is the rank itself; several are started by DeepSpeed's launcher."""
    if world.processes == 1:
        return [sys.executable, "-m", "launch.nodes.rank", str(run_dir)]
    devices = {host: _device_ids(world.processes) for host in world.hosts}
    return [
        *(sys.executable, "-m", "launch.nodes.bound", "deepspeed.launcher.launch"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()}",
        f"--node_rank={world.node}",
        f"--master_addr={world.address}",
        f"--master_port={world.port}",
        "--log_level=critical",
        *("--no_local_rank", "--module", "launch.nodes.rank", str(run_dir)),
    ]


def rank_environment(
    world: World, *, threads: int, is_explicit: bool, interface: str
) -> dict[str, str]:
    """This process's environment with what ranks need besides; the user's own wins.

    `threads` per rank win over it where they are explicit; ranks talk over `interface`.
    """
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **dict.fromkeys(INTERFACE_VARIABLES, interface),
        # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 calls old, at every start.
        "PYTHONWARNINGS": "ignore::FutureWarning",
        **os.environ,
        **module_environment(),
    }
    if is_explicit:
        environment["OMP_NUM_THREADS"] = str(threads)
    if world.processes == 1 and len(world.hosts) > 1:
        environment |= {
            "RANK": str(world.node),
            "WORLD_SIZE": str(len(world.hosts)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": world.address,
            "MASTER_PORT": str(world.port),
        }
    if not sees_gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def sees_gpus() -> bool:
    """Whether this process may use an NVIDIA GPU. (To ask torch takes seconds.)"""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))


def module_environment() -> dict[str, str]:
    """With which another Python of this machine finds our packages, and no others by our names."""
    return {
        # A train.py in the current folder must not be taken for our package.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, _module_path())),
    }


def _module_path() -> list[str]:
    """Where ranks find our packages when they are run from a clone that isn't installed."""
    root = str(Path(__file__).parents[2])
    given = os.environ.get("PYTHONPATH", "")
    return [given] if root.endswith("-packages") else [root, given]


def _device_ids(count: int) -> list[str]:
    """The first visible devices, as numbers or UUIDs; on the CPU the launcher only counts them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if sees_gpus() and visible:
        return visible.split(",")[:count]
    return [str(index) for index in range(count)]


def free_port(address: str = LOOPBACK) -> int:
    """A port of this machine at which nothing listens now."""
    with socket.socket() as listener:
        listener.bind((address, 0))
        port: int = listener.getsockname()[1]
        return port


def is_rank(process: psutil.Process, run_dir: Path) -> bool:
    """By its command line: `python -m train RUN_DIR`, or shortly before it becomes that."""
    command: list[str] = []
    with suppress(psutil.Error):
        command = process.cmdline()
    modules = ("train", "launch.nodes.rank")
    return command[-3:] in [["-m", module, str(run_dir)] for module in modules]


def _parent_pid(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return process.ppid()
    return None


def killing_signal(returncode: int) -> signal.Signals | None:
    """The signal that killed a rank: as it is, or as DeepSpeed's launcher passes it on, 256 - n."""
    number = -returncode if returncode < 0 else 256 - returncode
    return signal.Signals(number) if number in set(signal.Signals) else None
