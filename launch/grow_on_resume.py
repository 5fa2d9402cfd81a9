"""A run that goes on as a larger (or smaller) model in its own folder: `grow.on_resume=true`.

    RUN/growing/checkpoints/step-N          the grown checkpoint while it is written
    RUN/checkpoints/step-N                  then takes the place of the one that it was made of,
    RUN/checkpoints/step-N.before-growth    which is kept under this name

The config is written before the first of the two renames, so that whatever a kill leaves says which
of both models the run has, and the next start can finish what was begun.
"""

import logging
import shutil
from dataclasses import fields, replace
from pathlib import Path

from launch.run_folder import compare, has_begun, refuse_fixed
from launch.settings.config import LaunchedRun
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import Manifest, read_manifest
from train.config import CONFIG_FILE, RunConfig, describe_config, read_config, typed, write_config
from train.config_diff import diff_values
from train.grow.config import check_growth
from train.grow.measure import describe
from train.grow.run import grow
from train.ranks import alone

log = logging.getLogger(__name__)

STAGE = "growing"
REPLACED = ".before-growth"


def grow_on_resume(config: LaunchedRun) -> LaunchedRun:
    """Make the newest checkpoint one of the config's model, if that is asked for and differs.

    The config comes back without the leave, which is for this start only.

    Raises:
        ValueError: Something else changes that a continuation can't change, or no growth leads
            from the checkpoint's model to the config's.
    """
    run_dir = Path(config.run_dir)
    finish_swap(run_dir)
    settled = replace(config, grow=replace(config.grow, on_resume=False))
    if not config.grow.on_resume or not has_begun(run_dir):
        return settled
    kept = read_config(run_dir / CONFIG_FILE, LaunchedRun)
    changes = compare(kept, config)
    refuse_fixed(run_dir, changes, but="model")
    manifest = Checkpoints(run_dir).find_newest(alone())
    assert manifest is not None, "a run that has begun has a checkpoint, or find_newest refuses"
    old = config_of(manifest)
    model = describe_config(config)["model"]
    if not check_growth(describe_config(old)["model"], model):
        return settled
    old.data = config.data  # where the corpus is now
    for change in changes:
        log.info("changed since the last start: %s", change)
    grown = grow(
        run_dir,
        old,
        config,
        config.grow,
        report=lambda difference: log.info("%s", "\n".join(describe(difference))),
        into=run_dir / STAGE,
    )
    write_config(settled, run_dir / CONFIG_FILE)
    finish_swap(run_dir)
    log.info(
        "grown at step %d; the checkpoint of before is kept as %s",
        grown.step,
        replaced(Checkpoints(run_dir).path(grown.step)),
    )
    return settled


def finish_swap(run_dir: Path) -> None:
    """Put a grown checkpoint in its place if the config says so already; else forget it."""
    staged = Checkpoints(run_dir / STAGE)
    for step in staged.steps():
        model = describe_config(read_config(run_dir / CONFIG_FILE, RunConfig))["model"]
        if diff_values(read_manifest(staged.path(step)).config["model"], model):
            continue
        final = Checkpoints(run_dir).path(step)
        if final.exists():
            shutil.rmtree(replaced(final), ignore_errors=True)
            final.rename(replaced(final))
        staged.path(step).rename(final)
    shutil.rmtree(run_dir / STAGE, ignore_errors=True)


def replaced(checkpoint: Path) -> Path:
    """Where the checkpoint is kept that a grown one took the place of."""
    return checkpoint.with_name(checkpoint.name + REPLACED)


def config_of(manifest: Manifest) -> RunConfig:
    """The config that the checkpoint was saved with."""
    known = {field.name for field in fields(RunConfig)}
    return typed({key: value for key, value in manifest.config.items() if key in known}, RunConfig)
