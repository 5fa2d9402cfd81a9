"""`python -m launch.start.slurm_job RUN_DIR`: what a batch job of Slurm's runs on its first node.

USR1 (the time limit is near) makes the ranks save and the job queue again; so does a preemption, of
which only the ranks are told. TERM (scancel) makes them save, and the job ends.
"""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from launch.run_folder import hold_folder
from launch.settings.config import LaunchedRun
from launch.start.starters import JobStarter
from launch.survive.supervise import Supervisor
from train.config import CONFIG_FILE, read_config
from train.outcome import ExitCode, Status

log = logging.getLogger(__name__)


def main() -> ExitCode:
    """Supervise the run within the allocation; queue again where it was cut short."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    run_dir = Path(sys.argv[1])
    config = read_config(run_dir / CONFIG_FILE, LaunchedRun)
    supervisor = Supervisor(config, JobStarter(config.launch))
    is_near_limit = False

    def save(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_near_limit
        is_near_limit = True
        supervisor.stop()

    signal.signal(signal.SIGUSR1, save)
    with hold_folder(run_dir):
        outcome = supervisor.run()
    was_cancelled = supervisor.is_stopping and not is_near_limit
    if outcome.status is Status.interrupted and not was_cancelled:
        job = os.environ["SLURM_JOB_ID"]
        supervisor.timeline.note("requeued", f"job {job}: {outcome.reason or 'preempted'}")
        subprocess.run(["scontrol", "requeue", job], check=False)  # noqa: S603, S607
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
