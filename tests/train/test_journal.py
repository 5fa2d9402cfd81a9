"""Where a run's numbers go: JSON lines, the terminal, wandb."""

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from train.display import LineDisplay, LiveDisplay, describe
from train.journal import (
    METRICS_FILE,
    WANDB_ID_FILE,
    JsonLines,
    LoggingConfig,
    Record,
    WandbMode,
    check_logging,
    open_journal,
    read_records,
)


def record(step: int, event: str = "step") -> Record:
    return {"event": event, "step": step, "loss": 1.5, "max_vio": 0.25, "memory_bytes": 2**30}


def test_a_resumed_journal_drops_what_will_happen_again_and_a_line_cut_short(
    tmp_path: Path,
) -> None:
    path = tmp_path / METRICS_FILE
    lines = JsonLines(path, resumed_step=0)
    for step in (1, 2, 3):
        lines.write(record(step))
    lines.close()
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    resumed = JsonLines(path, resumed_step=2)
    resumed.write(record(3, "evaluation"))
    resumed.close()
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in kept] == [
        ("step", 1),
        ("step", 2),
        ("evaluation", 3),
    ]
    assert [line["step"] for line in read_records(tmp_path, event="step")] == [1, 2]


def test_lines_tell_numbers_and_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    display = LineDisplay(step=0, steps=10)
    display.write(record(5))
    out = capsys.readouterr().out
    assert out.startswith("step 5/10  loss 1.5000  1.00 GiB peak  MaxVio 0.25  ETA 0:00:")


def test_a_terminal_shows_a_bar_with_the_current_numbers() -> None:
    stream = io.StringIO()
    display = LiveDisplay(
        Console(file=stream, force_terminal=True, width=120, color_system=None), step=0, steps=10
    )
    display.write(record(5))
    display.write(record(5, "evaluation"))
    display.close()
    out = stream.getvalue()
    assert "5/10" in out
    assert "MaxVio 0.25" in out
    assert "evaluation: loss 1.5000" in out


def test_skipped_steps_are_shown_once_there_are_any() -> None:
    assert "skipped" not in describe({"skipped": 0})
    assert describe({"skipped": 2}) == "skipped 2"


@pytest.mark.slow
def test_wandb_offline_keeps_the_run_without_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real package; its file holds the numbers, a resumed run keeps the same id."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = LoggingConfig(wandb_project="thrifty-test", wandb_mode=WandbMode.offline)
    run_dir = tmp_path / "some-run"
    run_dir.mkdir()
    for step in (1, 2):
        with open_journal(config, run_dir=run_dir, step=step - 1, steps=2, about={}) as journal:
            journal.write(record(step))
    stored = list(
        run_dir.glob(f"wandb/offline-run-*/run-{(run_dir / WANDB_ID_FILE).read_text()}.wandb")
    )
    assert len(stored) == 2
    # wandb's own process may write a little after `finish` has returned.
    deadline = time.monotonic() + 60
    while not all(b"step/max_vio" in path.read_bytes() for path in stored):
        assert time.monotonic() < deadline, "wandb stored no numbers"
        time.sleep(0.1)


def test_numbers_that_are_not_finite_are_null_so_that_every_reader_can_parse_them(
    tmp_path: Path,
) -> None:
    lines = JsonLines(tmp_path / METRICS_FILE, resumed_step=0)
    lines.write({"event": "step", "step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    lines.close()
    assert read_records(tmp_path, event="step") == [
        {"event": "step", "step": 1, "loss": None, "grad_norm": None}
    ]


def test_an_interval_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="logging.every=0 must be at least 1"):
        check_logging(LoggingConfig(every=0))
