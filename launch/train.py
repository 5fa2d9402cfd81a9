"""`thrifty train`: compose, check, prepare the corpus if need be, start the ranks right here."""

import logging
import sys

from launch.begin import begin, settle
from launch.settings.compose import Job, run_jobs, worst
from launch.settings.config import LaunchedRun, LocalLaunch
from launch.start.local import run_ranks
from launch.sweep import report_sweep
from train.outcome import ExitCode, Status

log = logging.getLogger(__name__)


def main() -> ExitCode:
    """Train what the command line asks for; several runs (`-m`) one after another."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    results = run_jobs(train_job, schema=LaunchedRun)
    report_sweep(results)
    return worst(results)


def train_job(job: Job) -> ExitCode:
    """Train one run, from its checkpoint if it has one.

    Raises:
        ValueError: The config can't be run, or the folder holds another run.
    """
    config = settle(job)
    if not isinstance(config.launch, LocalLaunch):
        raise ValueError(
            f"launch={config.launch.kind} starts ranks elsewhere, but thrifty train only here; use "
            "thrifty launch, or launch=local"
        )
    with begin(config) as run_dir:
        outcome = run_ranks(run_dir, config.launch)
    if outcome.status is not Status.finished:
        log.error("%s: %s", outcome.status, outcome.reason)
    if outcome.status is Status.interrupted:
        log.info("the same command with run_dir=%s continues", run_dir)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
