"""Launches on the test's hosts, and what is read from their folders."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from launch.survive.timeline import Moment, read_timeline
from tests.cluster.hosts import Hosts

SECONDS = 600.0  # a safety net: what is awaited takes seconds on an idle machine

Losses = dict[int, float]

SETTINGS = [
    "experiment=smoke",
    "data=files",
    "model.vocab_size=512",
    "data.tokenizer.vocab_size=512",
    "data.validation_fraction=0.2",
    "schedule.steps=300",
    "checkpoint.every=20",
    "checkpoint.keep=3",
    "evaluation.every=300",
    "launch.supervision.backoff_seconds=0.2",
    "launch.supervision.lost_after_seconds=12",
    "launch.doctor.bandwidth=false",
    "watchdog.min_seconds=12",
    "watchdog.heartbeat_seconds=1",
    "watchdog.gather_seconds=3",
]


def start(hosts: Hosts, verb: str, *arguments: str, on: str = "th1") -> subprocess.Popen[str]:
    """`thrifty VERB ARGUMENTS` on a host."""
    return subprocess.Popen(
        hosts.command(on, sys.executable, "-m", "launch.cli", verb, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PYTHONSAFEPATH": "1",
        },
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def read_losses(run_dir: Path) -> Losses:
    """The loss of every step so far."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if record["event"] == "step"}


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Return once the run has logged that step."""
    wait_until(lambda: max(read_losses(run_dir), default=0) >= step, process)


def wait_until(claim: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not claim():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def moments(run_dir: Path, event: str) -> list[Moment]:
    """The timeline's entries of one kind."""
    return [moment for moment in read_timeline(run_dir) if moment.event == event]


class Recovery(NamedTuple):
    """How long a fault kept the run from training, in seconds."""

    fault: str
    noticed: float  # from the fault to the supervisor's knowing
    started: float  # from there to the start of new ranks: ending the old ones, back-off
    trained: float  # from there to the end of their first step: Python, DeepSpeed, checkpoint


def read_recovery(run_dir: Path, fault: str, *, struck: float) -> Recovery:
    """The first recovery in the timeline of a run that was struck at that time."""
    failed = moments(run_dir, "failed")[0].time
    started = moments(run_dir, "started")[1].time
    training = moments(run_dir, "training")[1].time
    return Recovery(fault, failed - struck, started - failed, training - started)
