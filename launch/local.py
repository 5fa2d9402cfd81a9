"""The ranks of a run on this machine: started, watched, told to stop.

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
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from launch.config import LaunchConfig, threads_of
from launch.rank import log_path
from train.interrupt import on_stop_signal
from train.outcome import OUTCOME_FILE, Outcome, Status, read_outcome

log = logging.getLogger(__name__)

# Seconds that ranks may go on saving after the launcher above them has died.
ORPHANS_GRACE = 60.0


def run_ranks(run_dir: Path, launch: LaunchConfig) -> Outcome:
    """The outcome of all ranks' run, after the last process of it has ended."""
    (run_dir / OUTCOME_FILE).unlink(missing_ok=True)
    for rank in range(1, launch.processes):
        log_path(run_dir, rank).unlink(missing_ok=True)
    process = subprocess.Popen(  # noqa: S603 (a list, no shell)
        launcher_command(run_dir, launch),
        env=rank_environment(launch),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # the terminal's Ctrl-C reaches this process alone
    )
    ranks = LocalRanks(process, run_dir)
    with on_stop_signal(ranks.stop):
        process.wait()
        ranks.end_orphans()
    outcome = read_outcome(run_dir)
    if outcome is not None:
        if outcome.status is Status.failed:
            outcome.reason += _last_words(run_dir, launch, process.returncode)
        return outcome
    # SIGTERM kills a rank only as long as it has nothing to save.
    is_unbegun = ranks.num_signals and _killing_signal(process.returncode) == signal.SIGTERM
    if ranks.is_stopped_early or is_unbegun:
        reason = "stopped before the ranks were ready"
        return Outcome(status=Status.interrupted, step=0, reason=reason)
    reason = "a rank died without leaving an outcome"
    reason += _last_words(run_dir, launch, process.returncode)
    return Outcome(status=Status.failed, step=-1, reason=reason)


class LocalRanks:
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
        self._kill()

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
            self._kill()

    def _ranks(self) -> list[psutil.Process]:
        """The ranks themselves, without the launcher above and the workers below them."""
        members = {process.pid: process for process in self._members()}
        ranks = {pid for pid, process in members.items() if _is_rank(process, self.run_dir)}
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

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def launcher_command(run_dir: Path, launch: LaunchConfig) -> list[str]:
    """One process is the rank itself; several are started by DeepSpeed's launcher."""
    if launch.processes == 1:
        return [sys.executable, "-m", "launch.rank", str(run_dir)]
    world = {"localhost": _device_ids(launch.processes)}
    return [
        *(sys.executable, "-m", "launch.bound", "deepspeed.launcher.launch"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        "--master_addr=127.0.0.1",
        f"--master_port={_free_port()}",
        "--log_level=critical",
        *("--no_local_rank", "--module", "launch.rank", str(run_dir)),
    ]


def rank_environment(launch: LaunchConfig) -> dict[str, str]:
    """This process's environment with what ranks on one machine need; the user's own wins."""
    environment = {
        "OMP_NUM_THREADS": str(threads_of(launch)),
        # Ranks meet on the loopback interface, whatever the host's name resolves to.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 calls old, at every start.
        "PYTHONWARNINGS": "ignore::FutureWarning",
        **os.environ,
        # A train.py in the current folder must not be taken for our package.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, _module_path())),
    }
    if launch.threads_per_process is not None:
        environment["OMP_NUM_THREADS"] = str(launch.threads_per_process)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def _module_path() -> list[str]:
    """Where ranks find our packages when they are run from a clone that isn't installed."""
    root = str(Path(__file__).parents[1])
    given = os.environ.get("PYTHONPATH", "")
    return [given] if root.endswith("-packages") else [root, given]


def _device_ids(count: int) -> list[str]:
    """The first visible devices, as numbers or UUIDs; on the CPU the launcher only counts them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if torch.cuda.is_available() and visible:
        return visible.split(",")[:count]
    return [str(index) for index in range(count)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _is_rank(process: psutil.Process, run_dir: Path) -> bool:
    """By its command line: `python -m train RUN_DIR`, or shortly before it becomes that."""
    command: list[str] = []
    with suppress(psutil.Error):
        command = process.cmdline()
    return command[-3:] in (["-m", "train", str(run_dir)], ["-m", "launch.rank", str(run_dir)])


def _parent_pid(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return process.ppid()
    return None


def _last_words(run_dir: Path, launch: LaunchConfig, returncode: int) -> str:
    """The signal that killed a rank, if one did, and which logs to read."""
    words = ""
    number = _killing_signal(returncode)
    if number is not None:
        words += f"; a rank was killed by {number.name}"
        words += " (out of memory?)" if number == signal.SIGKILL else ""
    logs = [log_path(run_dir, rank) for rank in range(1, launch.processes)]
    spoken = [str(path) for path in logs if path.is_file() and path.stat().st_size]
    if spoken:
        words += f"; see above and {', '.join(spoken)}"
    return words


def _killing_signal(returncode: int) -> signal.Signals | None:
    """The signal that killed a rank: as it is, or as DeepSpeed's launcher passes it on, 256 - n."""
    number = -returncode if returncode < 0 else 256 - returncode
    return signal.Signals(number) if number in set(signal.Signals) else None
