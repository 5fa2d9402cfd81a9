"""`thrifty train` with real ranks: signals, deaths and sweeps, seen from outside."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.command import start, thrifty
from train.outcome import ExitCode

SECONDS = 600  # a safety net: what is awaited takes a few when the machine is idle


def wait_until(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not claim():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


def num_steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"event": "step"') if path.exists() else 0


def find_ranks(run_dir: Path) -> list[psutil.Process]:
    """The run's living ranks; what ends while this looks at it is none."""
    ranks = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[-3:] == ["-m", "train", str(run_dir)]:
                ranks.append(process)
    return ranks


def start_two_ranks(smoke: list[str], run_dir: Path) -> subprocess.Popen[str]:
    """A run of two ranks, EP 2, that would go on for long, once it has done some steps."""
    process = start(
        "train",
        *smoke,
        f"run_dir={run_dir}",
        "launch.processes=2",
        "parallel.expert=2",
        "schedule.steps=100000",
        "checkpoint.every=100000",
        "evaluation.every=100000",
        cwd=run_dir.parent,
    )
    before = num_steps(run_dir)
    wait_until(lambda: num_steps(run_dir) >= before + 3 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    return process


def test_ctrl_c_saves_and_the_same_command_continues(smoke: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start_two_ranks(smoke, run_dir)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, output
    assert "the ranks finish their step and save" in output
    assert find_ranks(run_dir) == []
    step = json.loads((run_dir / "outcome.json").read_text())["step"]
    assert (run_dir / "checkpoints" / f"step-{step:08}").is_dir()

    code, output = thrifty(
        "train", *smoke, f"run_dir={run_dir}", f"schedule.steps={step + 2}", cwd=tmp_path
    )
    assert code == 0, output
    assert f"schedule.steps: 100000 -> {step + 2}" in output
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    numbers = [record["step"] for record in steps if record["event"] == "step"]
    assert numbers == list(range(1, step + 3))


@pytest.mark.slow
def test_a_killed_rank_takes_the_others_with_it_and_is_named(
    smoke: list[str], tmp_path: Path
) -> None:
    process = start_two_ranks(smoke, tmp_path / "run")
    find_ranks(tmp_path / "run")[1].kill()
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, output
    assert "killed by SIGKILL" in output
    assert find_ranks(tmp_path / "run") == []


@pytest.mark.slow
def test_ranks_do_not_outlive_a_launcher_that_was_killed(smoke: list[str], tmp_path: Path) -> None:
    process = start_two_ranks(smoke, tmp_path / "run")
    process.kill()
    process.communicate(timeout=SECONDS)
    wait_until(lambda: find_ranks(tmp_path / "run") == [])
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["status"] == "interrupted"


@pytest.mark.slow
def test_a_sweep_compares_its_runs_and_survives_one_that_is_refused(
    smoke: list[str], tmp_path: Path
) -> None:
    code, output = thrifty(
        *("train", "-m", *smoke, f"run_dir={tmp_path / 'sweep'}"),
        *("model.moe.num_experts=4,1,8", "schedule.steps=2", "schedule.warmup_steps=0"),
        cwd=tmp_path,
    )
    assert code == 2, output
    assert "model.moe.top_k=2 exceeds model.moe.num_experts=1" in output
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["status"] for row in rows] == ["finished", "refused", "finished"]
    assert [row["settings"] for row in rows] == [
        {"model.moe.num_experts": "4"},
        {"model.moe.num_experts": "1"},
        {"model.moe.num_experts": "8"},
    ]
    assert [Path(row["folder"]) for row in rows] == [tmp_path / "sweep" / n for n in "012"]
    small, _, large = (row["summary"] for row in rows)
    assert small["parameters_total"] < large["parameters_total"]
    for key in ("parameters_active", "tokens_per_second", "memory_bytes", "validation_loss"):
        assert small[key] > 0
    assert "refused" in output


@pytest.mark.slow
def test_state_that_is_missing_or_surplus_passes_only_if_it_is_named(
    smoke: list[str], tmp_path: Path
) -> None:
    """AdamW's run goes on with Muon: the command refuses twice and says what to name."""

    def train(*settings: str) -> tuple[int, str]:
        return thrifty("train", *smoke, "run_dir=run", *settings, cwd=tmp_path)

    assert train("schedule.steps=2")[0] == 0
    changed = ["optimizer=muon", "schedule.steps=3"]
    code, output = train(*changed)
    assert code == ExitCode.FAILED, output  # found by the ranks
    assert "checkpoint.allow_missing=[momentum/*]" in output
    changed.append("checkpoint.allow_missing=[momentum/*]")
    code, output = train(*changed)
    assert code == ExitCode.FAILED, output  # found by the ranks
    assert "has exp_avg/" in output
    assert "name it in checkpoint.allow_surplus" in output
    changed.append("checkpoint.allow_surplus=[exp_avg*/*]")
    code, output = train(*changed)
    assert code == 0, output
    assert "the checkpoint of step 2 lacks momentum/" in output
    assert num_steps(tmp_path / "run") == 3
