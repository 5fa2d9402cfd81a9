"""`thrifty prepare`: make the corpus of a run ready; nothing is done twice."""

import logging
import sys

from data.config import MixtureData, find_folder
from data.mirror import is_remote
from data.prepare import make_ready, prepare
from data.report import describe_report, describe_sources, read_report
from launch.settings.compose import Job, run_jobs, to_config, worst
from launch.settings.config import LaunchedRun, check_launched
from train.outcome import ExitCode


def main() -> ExitCode:
    """Prepare the corpora that the command line asks for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return worst(run_jobs(prepare_job, schema=LaunchedRun))


def prepare_job(job: Job) -> ExitCode:
    """Prepare the corpus of one run's config; the rest of the config is only checked."""
    config = to_config(job.values, LaunchedRun)
    check_launched(config)
    if is_remote(config.data.folder):
        raise ValueError(
            f"data.folder={config.data.folder} is a URL, but corpora are made in local folders; "
            "prepare it in one, and copy that to the URL, where thrifty train reads it"
        )
    if isinstance(config.data, MixtureData):
        make_ready(config.data)
        print(describe_sources({one.name: find_folder(one) for one in config.data.sources}))
    elif (report := read_report(prepare(config.data).folder)) is not None:
        print(describe_report(report))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
