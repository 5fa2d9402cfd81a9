"""`thrifty status RUN`: how a run stands and what happened to it."""

import fcntl
import sys
from pathlib import Path

from launch.run_folder import newest_run
from launch.survive.timeline import read_timeline
from train.checkpoint.checkpoints import Checkpoints
from train.config import CONFIG_FILE
from train.journal import read_records
from train.outcome import ExitCode, read_outcome
from train.watch.stall import EXPLANATION, FOLDER, read_explanation


def main() -> ExitCode:
    """Print the state and the timeline of the run that is named; of the newest without a name."""
    arguments = [argument.removeprefix("run_dir=") for argument in sys.argv[1:]]
    if {"--help", "-h"} & set(arguments):
        print("usage: thrifty status [RUN_DIR]\n\nHow a run stands and what happened to it.")
        return ExitCode.FINISHED
    try:
        run_dir = Path(arguments[0] if arguments else newest_run())
        print(describe(run_dir))
    except ValueError as error:
        print(error, file=sys.stderr)
        return ExitCode.MISTAKE
    return ExitCode.FINISHED


def describe(run_dir: Path) -> str:
    """The state in a few lines, then the timeline.

    Raises:
        ValueError: The folder holds no run.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise ValueError(f"{run_dir} holds no run; give the folder of one")
    outcome = read_outcome(run_dir)
    if is_held(run_dir):
        state = "running"
    elif outcome is not None:
        state = f"{outcome.status}" + (f": {outcome.reason}" if outcome.reason else "")
    else:
        state = "not running, and without an outcome"
    lines = [f"run         {run_dir}", f"state       {state}"]
    for record in read_records(run_dir, event="step")[-1:]:
        lines.append(
            f"last step   {record['step']}  loss {record['loss']:.4f}  "
            f"{record['tokens_per_second']:,.0f} tok/s"
        )
    steps = Checkpoints(run_dir, keep=1).steps()
    lines.append(f"checkpoint  {f'step {steps[-1]}' if steps else 'none'}")
    stalls = sorted((run_dir / FOLDER).glob(f"start-*/{EXPLANATION}"))
    for path in stalls[-1:]:
        attempt = int(path.parent.name.removeprefix("start-"))
        explanation = read_explanation(run_dir, attempt=attempt)
        if explanation is not None:
            lines.append(f"last stall  {explanation.summary}  ({path.with_suffix('.md')})")
    moments = [moment.describe() for moment in read_timeline(run_dir)]
    return "\n".join([*lines, *(["", *moments] if moments else [])])


def is_held(run_dir: Path) -> bool:
    """Whether a launcher is at work in the folder."""
    try:
        with (run_dir / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


if __name__ == "__main__":
    sys.exit(main())
