"""What a sweep found: one row per run, as a table and as sweep.json in the sweep's folder."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.settings.compose import Result
from train.outcome import ExitCode, read_outcome

SWEEP_FILE = "sweep.json"

# Key in an outcome's summary, heading, and how the number is shown.
COLUMNS = (
    ("parameters_total", "parameters", lambda number: f"{number / 1e6:,.2f} M"),
    ("parameters_active", "active", lambda number: f"{number / 1e6:,.2f} M"),
    ("tokens_per_second", "tokens/s", lambda number: f"{number:,.0f}"),
    ("memory_bytes", "memory", lambda number: f"{number / 2**20:,.0f} MiB"),
    ("validation_loss", "validation loss", lambda number: f"{number:.4f}"),
)


def report_sweep(results: list[Result]) -> None:
    """Print and write down what the runs of a sweep came to; nothing where there was none."""
    folders = [result.job.folder for result in results if result.job.folder is not None]
    if not folders:
        return
    rows = read_rows(results)
    sweep_folder = folders[0].parent
    (sweep_folder / SWEEP_FILE).write_text(json.dumps(rows, indent=2) + "\n")
    console = Console()
    console.print(draw_table(rows))
    console.print(f"runs and {SWEEP_FILE}: {sweep_folder}", soft_wrap=True)


def read_rows(results: list[Result]) -> list[dict[str, Any]]:
    """Per run: number, swept settings, folder, status, complaint or reason, summary."""
    swept = _swept_keys(results)
    rows = []
    for number, result in enumerate(results):
        folder = result.job.folder
        assert folder is not None, "every job of a sweep has a folder"
        outcome = None if result.complaint else read_outcome(folder)
        status = "refused" if result.exit_code == ExitCode.MISTAKE else "failed"
        rows.append(
            {
                "run": number,
                "settings": {key: _settings(result)[key] for key in swept},
                "folder": str(folder),
                "status": str(outcome.status) if outcome else status,
                "reason": outcome.reason if outcome else result.complaint,
                "summary": outcome.summary if outcome else {},
            }
        )
    return rows


def draw_table(rows: list[dict[str, Any]]) -> Table:
    """One row per run; a run without numbers shows its status in their place."""
    table = Table("run")
    for key in rows[0]["settings"]:
        table.add_column(key.replace(".", ".\n"), justify="right")
    table.add_column("status")
    for _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [
            show(row["summary"][key]) if key in row["summary"] else "-" for key, _, show in COLUMNS
        ]
        table.add_row(str(row["run"]), *row["settings"].values(), row["status"], *numbers)
    return table


def _settings(result: Result) -> dict[str, str]:
    """Key and value of each override of a run."""
    return dict(override.split("=", 1) for override in result.job.overrides)


def _swept_keys(results: list[Result]) -> list[str]:
    """Keys whose values differ between the runs."""
    settings = [_settings(result) for result in results]
    return [key for key in settings[0] if len({values[key] for values in settings}) > 1]
