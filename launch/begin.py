"""What comes before the ranks, however they are started: config, folder, corpus."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.config import MixtureData, find_folder
from data.mirror import is_remote
from data.prepare import make_ready
from launch.grow_on_resume import grow_on_resume
from launch.run_folder import hold_folder, prepare_folder, take_up
from launch.settings.compose import Job, to_config
from launch.settings.config import LaunchedRun, LocalLaunch, check_launched
from train.checkpoint.restore import check_start

log = logging.getLogger(__name__)


def settle(job: Job) -> LaunchedRun:
    """The checked config of a run, continued from its folder's if it has begun.

    Raises:
        ValueError: The config can't be run.
    """
    config = to_config(job.values, LaunchedRun)
    if job.folder is not None:
        config = dataclasses.replace(config, run_dir=str(job.folder))
        log.info("\nrun %s of the sweep: %s", job.folder.name, " ".join(job.overrides))
    else:
        config = take_up(config, job.overrides)
    check_launched(config)
    # Later commands may come from elsewhere; they read where the corpus is in the run's config.
    corpora = config.data.sources if isinstance(config.data, MixtureData) else [config.data]
    for each in corpora:
        if not is_remote(each.folder):
            each.folder = str(find_folder(each).absolute())
    if not isinstance(config.launch, LocalLaunch):  # ranks elsewhere start in other folders
        config = dataclasses.replace(config, run_dir=str(Path(config.run_dir).absolute()))
    check_start(config)
    return config


@contextmanager
def begin(config: LaunchedRun) -> Iterator[Path]:
    """While entered: the run's folder, held against a second start, its config written and its
    corpus ready.

    Raises:
        ValueError: The folder holds another run, or another process trains in it.
    """
    run_dir = Path(config.run_dir)
    with hold_folder(run_dir):
        config = grow_on_resume(config)
        for change in prepare_folder(config):
            log.info("changed since the last start: %s", change)
        make_ready(config.data)
        log.info("run folder: %s", run_dir)
        yield run_dir
