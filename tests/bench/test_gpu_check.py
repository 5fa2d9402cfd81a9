"""What `make gpu-check` does with parts that pass, fail, hang or can't run; with real processes."""

import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from bench.gpu_check import PARTS, Part, main, run_parts
from bench.rows import read_rows

PASSES = "from bench.rows import Row, note; note(Row('a step', '5 ms', 'theirs: 10 ms', '2.00'))"
# It measures something, starts a process that would outlive it, says where that is, and hangs.
HANGS = """
import subprocess, sys, time
from bench.rows import Row, note
note(Row('before it hung', '7 ms'))
print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)
time.sleep(600)
"""


def part(name: str, code: str, *, limit: float = 60.0, needs: tuple[str, ...] = ()) -> Part:
    return Part(name, ("-c", code), limit, needs)


def test_a_part_that_fails_or_hangs_is_told_and_the_next_ones_run(tmp_path: Path) -> None:
    page, logs = tmp_path / "page.md", tmp_path / "logs"
    outcomes = run_parts(
        [
            part("passes", PASSES),
            part("fails", "print('a reason'); raise SystemExit(3)"),
            part("hangs", "import time; time.sleep(600)", limit=1.0),
            part("lacks", "", needs=("no_such_package.module",)),
            part("goes on", "print('still here')"),
        ],
        machine="a device; 2 January 2026",
        page=page,
        logs=logs,
        budget=600.0,
    )
    assert [one.what for one in outcomes] == [
        "passed",
        "failed with exit code 3",
        "ended after its 1 s",
        "not run: no no_such_package.module here",
        "passed",
    ]
    assert [one.has_failed for one in outcomes] == [False, True, True, False, False]
    assert (logs / "02-fails.log").read_text() == "a reason\n"
    text = page.read_text()
    assert "**Machine:** a device; 2 January 2026" in text
    assert "| a step | 5 ms | theirs: 10 ms | 2.00 |" in text
    assert "| hangs | ended after its 1 s |" in text


def is_alive(pid: int) -> bool:
    """Not so if all that is left of it waits for its parent's notice."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.slow
def test_of_a_part_that_hangs_what_was_measured_is_kept_and_nothing_it_started(
    tmp_path: Path,
) -> None:
    page, logs = tmp_path / "page.md", tmp_path / "logs"
    hangs = part("hangs", HANGS, limit=30.0)
    run_parts([hangs], machine="", page=page, logs=logs, budget=600.0)
    assert "| before it hung | 7 ms |  |  |" in page.read_text()
    *_, left_behind = (logs / "01-hangs.log").read_text().split()
    deadline = time.monotonic() + 60  # the kill takes a moment
    while is_alive(int(left_behind)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_when_the_time_is_used_up_no_part_is_started(tmp_path: Path) -> None:
    (outcome,) = run_parts(
        [part("late", "raise SystemExit(0)")],
        machine="",
        page=tmp_path / "page.md",
        logs=tmp_path / "logs",
        budget=1.0,
    )
    assert outcome.what == "not run: no time was left"
    assert outcome.has_failed


def test_a_row_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('["a", "1 ms", "", ""]\n["b", "2')
    assert [row.benchmark for row in read_rows(rows)] == ["a"]


def test_without_a_device_nothing_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main() == 1
    assert "no CUDA device; nothing was checked" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_parts_are_named_once_and_each_has_a_limit() -> None:
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names)
    assert all(part.limit > 0 for part in PARTS)
