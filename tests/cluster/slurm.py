"""A real small Slurm on the test's hosts: controller on the first, a daemon on each, no cgroups."""

import os
import subprocess
import time
from pathlib import Path
from typing import Self

from tests.cluster.hosts import Hosts

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONFIG = """\
ClusterName=test
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=10
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=200000,batch_sched_delay=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


class Slurm:
    """While entered, jobs can be submitted on the first of the hosts."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts = hosts
        self.folder = folder
        self.first = hosts.names[0]

    def __enter__(self) -> Self:
        etc = self.folder / "etc"
        for path in (etc, self.folder / "state", self.folder / "spool"):
            path.mkdir(parents=True)
        nodes = [
            f"NodeName={name} NodeAddr={self.hosts.address(name)} CPUs=2 State=UNKNOWN"
            for name in self.hosts.names
        ]
        text = CONFIG.format(
            first=self.first,
            address=self.hosts.address(self.first),
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        (etc / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        munge = (
            f"cp {key} /run/munge.key && chmod 600 /run/munge.key && munged "
            "--key-file=/run/munge.key --socket=/run/munge.sock --pid-file=/run/munged.pid "
            "--log-file=/run/munged.log --seed-file=/run/munge.seed --num-threads=2"
        )
        for name in self.hosts.names:
            self.hosts.run(name, "mkdir", "-p", "/etc/slurm")
            self.hosts.run(name, "mount", "--bind", str(etc), "/etc/slurm")
            self._start(name, "sh", "-c", munge)
        self._start(self.first, "slurmctld", "-c")
        for name in self.hosts.names:
            self._start(name, "slurmd", "-N", name)
        deadline = time.monotonic() + 120
        states = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t")
        while self.run(*states).split() != ["idle"] * len(self.hosts.names):
            assert time.monotonic() < deadline, "the nodes do not come up"
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(self._command("scancel", "--user=root", "--signal=KILL"), check=False)
        for name in self.hosts.names:
            for pid in self.hosts.pids(name):
                comm = Path(f"/proc/{pid}/comm")
                if comm.exists() and comm.read_text().startswith(("slurm", "munged")):
                    os.kill(pid, 9)
            self.hosts.run(name, "umount", "/etc/slurm")

    def run(self, *command: str) -> str:
        """What a command of Slurm's prints on the first host."""
        done = subprocess.run(
            self._command(*command), capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        words = self.run("scontrol", "show", "job", job).split()
        return next((word.split("=")[1] for word in words if word.startswith("JobState=")), "")

    def _command(self, *command: str) -> list[str]:
        return self.hosts.command(self.first, *command)

    def _start(self, name: str, *command: str) -> None:
        done = subprocess.run(
            self.hosts.command(name, *command),
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / "start.log").open("ab"),
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, (self.folder / "start.log").read_text()
