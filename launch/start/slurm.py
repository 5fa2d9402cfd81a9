"""Slurm: a batch script that a person can read and edit, and its submission."""

import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from launch.nodes.node_ranks import module_environment
from launch.settings.config import LaunchedRun, SlurmLaunch
from train.outcome import ExitCode

log = logging.getLogger(__name__)

SCRIPT = "slurm/job.sh"


def write_script(config: LaunchedRun) -> str:
    """The text of the script. `launch.start.slurm_job` in it supervises; srun starts the ranks."""
    launch = config.launch
    assert isinstance(launch, SlurmLaunch)
    run_dir = Path(config.run_dir).absolute()
    name = re.sub(r"[^A-Za-z0-9._-]", "-", run_dir.name)
    options = [
        f"--job-name=thrifty-{name}",
        f"--nodes={_node_range(launch)}",
        f"--ntasks-per-node={launch.processes}",
        f"--output={run_dir}/slurm/%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{launch.save_seconds}",
    ]
    optional = {
        "partition": launch.partition,
        "account": launch.account,
        "time": launch.time,
        "cpus-per-task": launch.cpus_per_process,
        "gpus-per-node": _count_gpus(launch),
    }
    options += [f"--{key}={value}" for key, value in optional.items() if value is not None]
    lines = [f"#SBATCH {_quote_option(option)}" for option in [*options, *launch.options]]
    command = [sys.executable, "-u", "-m", "launch.start.slurm_job", str(run_dir)]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in module_environment().items()]
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by `thrifty launch`; may be edited and submitted again with sbatch: the run",
            "# goes on from its newest checkpoint. USR1 comes before the time limit: the ranks",
            "# save, and the job puts itself into the queue again.",
            *lines,
            "",
            *exports,
            f"exec {shlex.join(command)}",
            "",
        ]
    )


def submit(config: LaunchedRun) -> ExitCode:
    """Write the script and hand it to sbatch; the job goes on by itself.

    Raises:
        ValueError: There is no Slurm here, or it refuses the job.
    """
    run_dir = Path(config.run_dir).absolute()
    path = run_dir / SCRIPT
    path.parent.mkdir(exist_ok=True)
    path.write_text(write_script(config))
    try:
        done = subprocess.run(  # noqa: S603 (a list, no shell)
            ["sbatch", "--parsable", str(path)],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise ValueError(
            f"launch=slurm needs sbatch, which is not installed here; submit {path} on a login node"
        ) from error
    if done.returncode:
        raise ValueError(
            f"sbatch refuses {path}: {done.stderr.strip()}; change the launch group's values, or "
            "the script, and submit it with sbatch"
        )
    job = done.stdout.strip().partition(";")[0]
    log.info("submitted as job %s; thrifty status %s tells how it goes", job, run_dir)
    return ExitCode.FINISHED


def _node_range(launch: SlurmLaunch) -> str:
    fewest = launch.supervision.min_nodes
    return f"{fewest}-{launch.nodes}" if fewest is not None else str(launch.nodes)


def _count_gpus(launch: SlurmLaunch) -> int | None:
    if launch.gpus_per_node is not None:
        return launch.gpus_per_node or None
    return launch.processes if torch.cuda.is_available() else None


def _quote_option(option: str) -> str:
    """As sbatch reads it: in quotes where it holds a blank."""
    return f'"{option}"' if re.search(r"\s", option) else option
