"""The commands of those who start all ranks themselves: srun, mpirun, DeepSpeed's runner over pdsh.

Each rank becomes `python -m launch.nodes.rank RUN_DIR`, which finds its number in the environment
that its starter sets.
"""

import sys
from pathlib import Path

from launch.nodes.node_ranks import module_environment
from launch.nodes.order import SECRET, passed_environment
from launch.nodes.ssh import OPTIONS
from launch.settings.config import HostsLaunch, OpenMPILaunch, SlurmLaunch

HOSTFILE = "hostfile"
ENVIRONMENT_FILE = "deepspeed_env"


def srun_command(launch: SlurmLaunch, run_dir: Path, hosts: list[str]) -> list[str]:
    """Within an allocation; srun passes signals and this process's environment on."""
    command = [
        "srun",
        f"--nodes={len(hosts)}",
        f"--ntasks={len(hosts) * launch.processes}",
        f"--ntasks-per-node={launch.processes}",
        f"--nodelist={','.join(hosts)}",
        "--kill-on-bad-exit=1",
        "--unbuffered",
        "--export=ALL",
    ]
    if launch.cpus_per_process is not None:
        command.append(f"--cpus-per-task={launch.cpus_per_process}")
    return [*command, *_rank(sys.executable, run_dir)]


def mpirun_command(
    launch: OpenMPILaunch, run_dir: Path, hosts: list[str], variables: set[str]
) -> list[str]:
    """Open MPI over ssh; variables travel by name, their values don't stand on the command line."""
    names = {*passed_environment(), *module_environment(), *variables}
    command = [
        "mpirun",
        *("-np", str(len(hosts) * launch.processes)),
        *("--host", ",".join(f"{host}:{launch.processes}" for host in hosts)),
        *("--map-by", f"ppr:{launch.processes}:node", "--bind-to", "none"),
    ]
    for name in sorted(names):
        command += ["-x", name]
    return [*command, *_rank(launch.python or sys.executable, run_dir)]


def pdsh_command(run_dir: Path, hosts: list[str], *, address: str, port: int) -> list[str]:
    """DeepSpeed's runner. It reads hosts and environment from files (`pdsh_files`)."""
    return [
        *(sys.executable, "-m", "launch.nodes.bound", "deepspeed.launcher.runner"),
        *("--launcher", "pdsh", "--force_multi"),
        *("--hostfile", str(run_dir / HOSTFILE)),
        *("--include", "@".join(hosts)),
        *("--master_addr", address, "--master_port", str(port)),
        *("--no_local_rank", "--module", "launch.nodes.rank", str(run_dir)),
    ]


def pdsh_environment(run_dir: Path) -> dict[str, str]:
    """What pdsh and DeepSpeed's runner read themselves."""
    return {
        "DS_ENV_FILE": str(run_dir / ENVIRONMENT_FILE),
        "PDSH_RCMD_TYPE": "ssh",
        # Without these pdsh waits for a dead node for ever.
        "PDSH_SSH_ARGS_APPEND": " ".join(f"-o{name}={value}" for name, value in OPTIONS.items()),
    }


def pdsh_files(
    launch: HostsLaunch, run_dir: Path, hosts: list[str], environment: dict[str, str]
) -> dict[Path, str]:
    """Hosts, and the ranks' variables. DeepSpeed writes these on command lines: no secrets."""
    variables = {**passed_environment(), **module_environment(), **environment}
    return {
        run_dir / HOSTFILE: "".join(f"{host} slots={launch.processes}\n" for host in hosts),
        run_dir / ENVIRONMENT_FILE: "".join(
            f"{name}={value}\n"
            for name, value in variables.items()
            if not SECRET.search(name) and value and "\n" not in value
        ),
    }


def _rank(python: str, run_dir: Path) -> list[str]:
    return [python, "-u", "-m", "launch.nodes.rank", str(run_dir)]
