"""The commands as a user types them: in this process where composing is all, else as a process."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from hydra._internal.hydra import Hydra
from hydra.types import RunMode

from launch.settings.compose import Job, run_jobs, to_config
from launch.settings.config import LaunchedRun, check_launched
from train.outcome import ExitCode


def compose(*overrides: str) -> LaunchedRun:
    """The checked config that `thrifty train OVERRIDES` would start."""
    configs = []

    def keep(job: Job) -> ExitCode:
        configs.append(to_config(job.values, LaunchedRun))
        check_launched(configs[0])
        return ExitCode.FINISHED

    with (
        mock.patch.object(sys, "argv", ["thrifty train", *overrides]),
        # It composes all once before, to tell a sweep from a run; hundreds of tests ask for a run.
        mock.patch.object(Hydra, "get_mode", return_value=RunMode.RUN),
    ):
        results = run_jobs(keep, schema=LaunchedRun)
    if results[0].exit_code != ExitCode.FINISHED:
        raise SystemExit(results[0].exit_code)
    return configs[0]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """`thrifty ARGUMENTS`, started in a folder, one thread per process."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PYTHONSAFEPATH": "1",
        },
    )


def thrifty(*arguments: str, cwd: Path, seconds: float = 600) -> tuple[int, str]:
    """Exit code of `thrifty ARGUMENTS`, and all that it printed."""
    process = start(*arguments, cwd=cwd)
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output
