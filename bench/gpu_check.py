"""`make gpu-check`: the GPU tests and the GPU benchmarks on one CUDA device, within nine minutes.

Needs a CUDA device and the installed dependencies; downloads nothing. Every part is a process with
a time limit of its own, the most important first, so that a kernel that hangs costs no more than
its part. After each of them gpu-check.md is written anew, as a section for docs/benchmarks.md; what
the parts print is in gpu-check/. Without a device it says so and fails: nothing that was not
measured is reported.
"""

import datetime
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from bench.rows import ROWS_VARIABLE, Row, read_rows

PAGE = Path("gpu-check.md")
LOGS = Path("gpu-check")
BUDGET = 525.0  # seconds for all parts: below nine minutes with what is around them
LEAST = 5.0  # with fewer left, no part is started


class Part(NamedTuple):
    name: str
    arguments: tuple[str, ...]  # of Python
    limit: float  # seconds
    needs: tuple[str, ...] = ()  # modules without which it can't run


class Outcome(NamedTuple):
    part: Part
    what: str  # passed, or why not
    seconds: float
    has_failed: bool


def _tests(name: str, paths: Sequence[str], limit: float, *needs: str) -> Part:
    arguments = ("-m", "pytest", "-q", "-m", "gpu", "--durations=5", *paths)
    return Part(name, arguments, limit, ("pytest", *needs))


def _bench(command: str, limit: float, *needs: str) -> Part:
    module, *options = command.split()
    arguments = ("-m", f"bench.{module}", *options)
    return Part(f"bench.{command}", arguments, limit, (f"bench.{module}", *needs))


PARTS = (
    _tests("tests of the model and its kernels", ["tests/model"], 150),
    _bench("cut_step", 100),
    _bench("cut_step --plain", 70),
    _bench("fp8", 50),
    _bench("moe", 60, "transformers"),
    _bench("fp8_training", 120),
    _tests("tests of training", ["tests/train"], 120, "deepspeed"),
    _bench("kernels", 60),
    _bench("attention", 40, "transformers"),
    _bench("documents", 30),
    _bench("loss", 30),
    _bench("grouped", 30),
    _bench("step", 60, "transformers"),
)


def main() -> int:
    """The number of parts that failed; 1 without a device."""
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device; nothing was checked", file=sys.stderr)
        return 1
    machine = (
        f"{torch.cuda.get_device_name()}; torch {torch.__version__} with CUDA "
        f"{torch.version.cuda}, Python {platform.python_version()}; {datetime.date.today()}"
    )
    outcomes = run_parts(PARTS, machine=machine, page=PAGE, logs=LOGS, budget=BUDGET)
    print(f"written: {PAGE}, and what the parts printed to {LOGS}/")
    return sum(outcome.has_failed for outcome in outcomes)


def run_parts(
    parts: Sequence[Part], *, machine: str, page: Path, logs: Path, budget: float
) -> list[Outcome]:
    """Each part in turn while time is left; the page is written after each."""
    logs.mkdir(parents=True, exist_ok=True)
    rows = logs / "rows.jsonl"
    rows.unlink(missing_ok=True)
    end = time.monotonic() + budget
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts, start=1):
        left = end - time.monotonic()
        print(f"== {part.name} (at most {part.limit:.0f} s, {left:.0f} s left)", flush=True)
        log = logs / f"{number:02}-{part.name.replace(' ', '-')}.log"
        outcomes.append(run_part(part, left=left, log=log, rows=rows))
        print(f"   {outcomes[-1].what}, {outcomes[-1].seconds:.0f} s", flush=True)
        page.write_text(write_page(machine, outcomes, read_rows(rows)))
    return outcomes


def run_part(part: Part, *, left: float, log: Path, rows: Path) -> Outcome:
    """What became of it; all that it printed is in `log`, whenever it ended."""
    missing = [module for module in part.needs if not _is_there(module)]
    if missing:
        return Outcome(part, f"not run: no {', '.join(missing)} here", 0.0, has_failed=False)
    if left < LEAST:
        return Outcome(part, "not run: no time was left", 0.0, has_failed=True)
    limit = min(part.limit, left)
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, ROWS_VARIABLE: str(rows.resolve()), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that what it starts ends with it
        )
        try:
            code = process.wait(limit)
            what = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            code, what = -1, f"ended after its {limit:.0f} s"
        finally:
            _end(process)
    return Outcome(part, what, time.monotonic() - start, has_failed=code != 0)


def write_page(machine: str, outcomes: Sequence[Outcome], rows: Sequence[Row]) -> str:
    """A section for docs/benchmarks.md."""
    lines = [
        "## On a GPU: `make gpu-check`",
        "",
        f"**Machine:** {machine}",
        "",
        "| benchmark | measured | peer | ratio |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "| part | outcome | seconds |",
        "|---|---|---|",
        *(f"| {one.part.name} | {one.what} | {one.seconds:.0f} |" for one in outcomes),
    ]
    return "\n".join([*lines, ""])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it, and whatever it has started and left behind."""
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


if __name__ == "__main__":
    sys.exit(main())
