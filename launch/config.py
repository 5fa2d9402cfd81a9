"""The config of `thrifty train`: the run, and how its ranks are started."""

import os
from dataclasses import dataclass, field

import torch

from data.config import DATA_KINDS
from model.config import MODEL_KINDS
from train.config import RunConfig, check_run
from train.schedule import SCHEDULE_KINDS


@dataclass(slots=True, kw_only=True)
class LaunchConfig:
    #: How ranks are started. `local`: on this machine, by DeepSpeed's launcher.
    kind: str = "local"
    #: Ranks to start, one process each; on GPUs at most one per visible device.
    processes: int = 1
    #: CPU threads of each rank; null shares the cores out evenly.
    threads_per_process: int | None = None


@dataclass(slots=True, kw_only=True)
class LaunchedRun(RunConfig):
    #: How the run's ranks are started; may differ from one start of a run to the next.
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def check_launched(config: LaunchedRun) -> None:
    """Refuse, with a ValueError naming key, value, rule and way out, what can't be started."""
    launch = config.launch
    if launch.kind != "local":
        raise ValueError(f"launch.kind={launch.kind} does not exist; choose local")
    for name in ("processes", "threads_per_process"):
        value = getattr(launch, name)
        if value is not None and value < 1:
            raise ValueError(f"launch.{name}={value} must be at least 1")
    # The kind of a section is its group's choice; `schedule.kind=wsd` alone would lie.
    for group, section, kinds in (
        ("model", config.model, MODEL_KINDS),
        ("data", config.data, DATA_KINDS),
        ("schedule", config.schedule, SCHEDULE_KINDS),
    ):
        if kinds.get(section.kind) is not type(section):
            raise ValueError(
                f"{group}.kind={section.kind} can't be set by itself; choose {group}=NAME, "
                f"NAME one of {', '.join(kinds)}"
            )
    num_gpus = torch.cuda.device_count()
    if num_gpus and launch.processes > num_gpus:
        raise ValueError(
            f"launch.processes={launch.processes} exceeds the {num_gpus} visible GPUs; choose "
            f"launch.processes <= {num_gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES=''"
        )
    check_run(config, num_ranks=launch.processes)


def threads_of(launch: LaunchConfig) -> int:
    """CPU threads for each rank: as configured, or an even share of the usable cores."""
    cores = len(os.sched_getaffinity(0))
    return launch.threads_per_process or max(cores // launch.processes, 1)
