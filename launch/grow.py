"""`thrifty grow from=RUN run_dir=NEW key=value ...`: a run goes on as a larger or smaller model."""

import logging
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from launch.run_folder import apply_overrides, compare, hold_folder, prepare_folder, refuse_fixed
from launch.settings.compose import Job, run_jobs, to_config, worst
from launch.settings.config import LaunchedRun, check_launched
from train.config import CONFIG_FILE, read_config
from train.grow.config import GrownMoments
from train.grow.measure import Difference, describe
from train.grow.run import check, grow
from train.outcome import ExitCode

FROM = "from="  # a word that Python keeps for itself, so the key has another name
KEY = "source"
OWN_KEYS = (KEY, "grow", "run_dir")  # of the command, not of the run

MOMENTS = {
    GrownMoments.copy: "copied with their weights; zero where weights are new (grow.moments=copy)",
    GrownMoments.zero: "zero everywhere (grow.moments=zero)",
}


@dataclass(slots=True, kw_only=True)
class GrownRun(LaunchedRun):
    #: Folder of the run that grows; `from=FOLDER` on the command line.
    source: str


def main() -> ExitCode:
    """Grow the run that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sys.argv[1:] = [
        f"{KEY}={text.removeprefix(FROM)!r}" if text.startswith(FROM) else text
        for text in sys.argv[1:]
    ]
    return worst(run_jobs(grow_job, schema=GrownRun, config_name="grow"))


def grow_job(job: Job) -> ExitCode:
    """Grow one run; say by how much its function changes, and then how it goes on."""
    composed = to_config(job.values, GrownRun)
    source = Path(composed.source).expanduser()
    old = read_config(source / CONFIG_FILE, LaunchedRun)
    overrides = [text for text in job.overrides if _section(text) not in OWN_KEYS]
    chosen = LaunchedRun(**{f.name: getattr(composed, f.name) for f in fields(LaunchedRun)})
    new = apply_overrides(old, chosen, overrides)
    new.run_dir = composed.run_dir
    check_launched(new)
    refuse_fixed(source, compare(old, new), but="model")
    changes = check(old, new, composed.grow)
    with hold_folder(Path(new.run_dir)):
        grown = grow(source, old, new, composed.grow, report=report)
        prepare_folder(new)
    print(f"moments           {MOMENTS[composed.grow.moments]}")
    for change in changes:
        print(f"changed           {change}")
    print(f"parameters        {grown.parameters:,}")
    print(f"checkpoint        {grown.path}")
    print(f"continue with     thrifty train run_dir={new.run_dir}")
    return ExitCode.FINISHED


def report(difference: Difference) -> None:
    """Print the change of the function, before anything is written."""
    print("\n".join(describe(difference)), flush=True)


def _section(override: str) -> str:
    return override.lstrip("+~").split("=")[0].split(".")[0]


if __name__ == "__main__":
    sys.exit(main())
