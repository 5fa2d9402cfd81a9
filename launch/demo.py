"""`make demo`: a small mixture of experts from nothing to text, with an interruption on the way.

It types what a user would: train, Ctrl-C half-way, the same command again, evaluate, generate.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import OmegaConf

from train.config import CONFIG_FILE
from train.journal import read_records
from train.outcome import ExitCode, Outcome, read_outcome

PROMPT = "def read_lines(path):\n"


def main() -> int:
    """Run the demo in a new folder below runs/; 0 if all of it went well."""
    run_dir = Path("runs") / time.strftime("demo_%Y-%m-%d_%H-%M-%S")
    command = ["train", "experiment=demo", f"run_dir={run_dir}", *sys.argv[1:]]

    stops = list[int]()
    signal.signal(signal.SIGINT, lambda number, _: stops.append(number))  # the child answers it

    say("Training on two ranks that share out the experts; it will be interrupted half-way.")
    training = start(*command)
    steps = wait_for_half(training, run_dir)
    if training.poll() is None and not stops:
        say(f"Half of the {steps} steps are done: Ctrl-C.")
        training.send_signal(signal.SIGINT)
    if training.wait() != ExitCode.INTERRUPTED:
        return fail("the training was to end with exit code 75", training.returncode)

    if stops:
        return ExitCode.INTERRUPTED
    say("Exit code 75: saved. The same command continues.")
    code = start(*command).wait()
    if code != ExitCode.FINISHED:
        return fail("the resumed training was to end with exit code 0", code)

    say("What the last checkpoint makes of held-out text, and what it writes:")
    for verb in (
        ("evaluate", f"run_dir={run_dir}", "max_sequences=64"),
        ("generate", f"run_dir={run_dir}", f"prompt={PROMPT}", "max_new_tokens=120"),
    ):
        code = start(*verb).wait()
        if code != ExitCode.FINISHED:
            return fail(f"thrifty {verb[0]} was to end with exit code 0", code)
    outcome = read_outcome(run_dir)
    assert outcome is not None, "a run that finished has left its outcome"
    print(describe_run(outcome, read_records(run_dir, event="step"), run_dir), flush=True)
    return ExitCode.FINISHED


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """The started `thrifty ARGUMENTS`, echoed as a user would type it."""
    print("$ thrifty", *(repr(a) if "\n" in a else a for a in arguments), flush=True)
    return subprocess.Popen([sys.executable, "-m", "launch.cli", *arguments])  # noqa: S603


def wait_for_half(training: subprocess.Popen[bytes], run_dir: Path) -> int:
    """The run's number of steps, once half of them are done or the training has ended."""
    while training.poll() is None:
        time.sleep(0.5)
        records = read_records(run_dir, event="step")
        if records:
            steps: int = OmegaConf.load(run_dir / CONFIG_FILE).schedule.steps
            if records[-1]["step"] >= steps // 2:
                return steps
    return 0


def describe_run(outcome: Outcome, steps: list[dict[str, Any]], run_dir: Path) -> str:
    """The numbers that tell whether the model has learnt, and the run's files."""
    loss, entropy = outcome.summary["validation_loss"], outcome.summary["unigram_entropy"]
    quarter = -(-len(steps) // 4)
    load = "  ".join(
        f"{mean(record['max_vio'] for record in steps[i : i + quarter]):.2f}"
        for i in range(0, len(steps), quarter)
    )
    return f"""
  unigram entropy of the validation text   {entropy:.3f} nats per token
  validation loss after {outcome.step} steps          {loss:.3f} nats: {1 - loss / entropy:.0%} less
  MaxVio (overload of the fullest expert)  {load}  by quarters of the run

  {run_dir}/config.yaml     every setting of the run
  {run_dir}/metrics.jsonl   loss, rates and expert load of its steps
  {run_dir}/checkpoints     `thrifty generate run_dir={run_dir}` reads the newest
"""


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def fail(expected: str, code: int) -> int:
    print(f"demo: {expected}, but it was {code}", file=sys.stderr)
    return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
