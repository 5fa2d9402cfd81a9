"""`thrifty checkpoints list|show|verify|diff|average run_dir=RUN`: look at what a run has saved."""

import json
import sys
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from launch.run_folder import default_to_newest
from launch.settings.compose import Job, first_word_is_the_action, run_jobs, to_config, worst
from train.checkpoint.integrity import CheckpointVerify
from train.checkpoint.tools import (
    average_checkpoints,
    diff_checkpoints,
    find_manifest,
    list_checkpoints,
)
from train.outcome import ExitCode

WIDTH = 110  # also where the output is no terminal


class Action(StrEnum):
    list = "list"
    show = "show"
    verify = "verify"
    diff = "diff"
    average = "average"


@dataclass(slots=True, kw_only=True)
class CheckpointsConfig:
    #: What to do; the first word after `thrifty checkpoints` is enough.
    action: Action = Action.list
    #: Folder of the run; the newest if it is not given.
    run_dir: str
    #: Step of the checkpoint that is shown, or of the first of two; null takes the last.
    step: int | None = None
    #: Run of the second checkpoint of a difference; null takes the same run.
    other_run: str | None = None
    #: Step of the second checkpoint of a difference; null takes the last.
    other_step: int | None = None
    #: Steps of which the mean is taken.
    steps: list[int] = field(default_factory=list)
    #: Folder of the new run that holds the mean.
    out: str | None = None


def main() -> ExitCode:
    """Do what the first word says."""
    first_word_is_the_action(Action)
    return worst(run_jobs(checkpoints_job, schema=CheckpointsConfig, config_name="checkpoints"))


def checkpoints_job(job: Job) -> ExitCode:
    """One action; without run_dir on the newest run."""
    default_to_newest(job.values)
    config = to_config(job.values, CheckpointsConfig)
    match config.action:
        case Action.list:
            return print_list(config, CheckpointVerify.fast)
        case Action.verify:
            return print_list(config, CheckpointVerify.full)
        case Action.show:
            return print_manifest(config)
        case Action.diff:
            return print_difference(config)
        case Action.average:
            return print_average(config)


def print_list(config: CheckpointsConfig, verify: CheckpointVerify) -> ExitCode:
    """A table, and exit code 1 if one is damaged; `verify` reads every byte, `list` doesn't."""
    found = list_checkpoints(Path(config.run_dir), verify=verify)
    table = Table("step", box=box.SIMPLE)
    for heading in ("tokens", "loss", "validation", "MB", "ranks"):
        table.add_column(heading, justify="right")
    table.add_column("health")
    for one in found:
        manifest = one.manifest
        evaluation = manifest.evaluation if manifest else None
        table.add_row(
            str(one.step),
            f"{manifest.tokens:,}" if manifest else "",
            f"{manifest.loss:.4f}" if manifest and manifest.loss is not None else "",
            f"{evaluation.loss:.4f}" if evaluation else "",
            f"{one.num_bytes / 1e6:,.1f}",
            str(manifest.layout.get("ranks", "")) if manifest else "",
            one.problem or f"good ({verify})",
        )
    Console(width=WIDTH).print(table)
    return ExitCode.FAILED if any(one.problem for one in found) else ExitCode.FINISHED


def print_manifest(config: CheckpointsConfig) -> ExitCode:
    """The manifest as JSON, but for the lists of tensors and files, of which it counts."""
    _, manifest = find_manifest(Path(config.run_dir), config.step)
    values = asdict(manifest)
    values["tensors"], values["files"] = len(manifest.tensors), len(manifest.files)
    print(json.dumps(values, indent=1))
    return ExitCode.FINISHED


def print_difference(config: CheckpointsConfig) -> ExitCode:
    """Keys, names of tensors and relative differences."""
    one = find_manifest(Path(config.run_dir), config.step)
    other = find_manifest(Path(config.other_run or config.run_dir), config.other_step)
    difference = diff_checkpoints(one, other)
    for change in difference.changes:
        print(f"config    {change}")
    for name in difference.only_first:
        print(f"first     {name}")
    for name in difference.only_second:
        print(f"second    {name}")
    for component, relative in difference.relative.items():
        print(f"{relative:9.2e} {component}")
    return ExitCode.FINISHED


def print_average(config: CheckpointsConfig) -> ExitCode:
    """The folder of the mean."""
    if config.out is None:
        raise ValueError("out is missing: the folder of the new run that holds the mean")
    path = average_checkpoints(Path(config.run_dir), config.steps, Path(config.out))
    print(f"mean of   {', '.join(map(str, config.steps))}")
    print(f"written   {path}")
    print(f"see       thrifty evaluate run_dir={config.out}")
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
