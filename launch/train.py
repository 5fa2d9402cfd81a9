"""`thrifty train`: compose, check, prepare the corpus if need be, start the ranks."""

import dataclasses
import logging
import sys
from pathlib import Path

from data.config import MixtureData, find_folder
from data.prepare import prepare
from launch.compose import Job, run_jobs, to_config, worst
from launch.config import LaunchedRun, check_launched
from launch.local import run_ranks
from launch.run_folder import hold_folder, prepare_folder, take_up
from launch.sweep import report_sweep
from train.outcome import ExitCode, Status
from train.restore import check_start

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
    config = to_config(job.values, LaunchedRun)
    if job.folder is not None:
        config = dataclasses.replace(config, run_dir=str(job.folder))
        log.info("\nrun %s of the sweep: %s", job.folder.name, " ".join(job.overrides))
    else:
        config = take_up(config, job.overrides)
    check_launched(config)
    # Later commands may come from elsewhere; they read where the corpus is in the run's config.
    config.data.folder = str(find_folder(config.data).absolute())
    if isinstance(config.data, MixtureData):
        for source in config.data.sources:
            source.folder = str(find_folder(source).absolute())
    check_start(config)
    run_dir = Path(config.run_dir)
    with hold_folder(run_dir):
        for change in prepare_folder(config):
            log.info("changed since the last start: %s", change)
        prepare(config.data)
        log.info("run folder: %s", run_dir)
        outcome = run_ranks(run_dir, config.launch)
    if outcome.status is not Status.finished:
        log.error("%s: %s", outcome.status, outcome.reason)
    if outcome.status is Status.interrupted:
        log.info("the same command with run_dir=%s continues", run_dir)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
