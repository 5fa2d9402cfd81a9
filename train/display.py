"""The run on the terminal: a live bar with the current numbers, or plain lines elsewhere."""

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display(Protocol):
    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_display(*, step: int, steps: int) -> Display:
    """A live display on a terminal, lines otherwise; both on standard output."""
    if sys.stdout.isatty():
        return LiveDisplay(Console(), step=step, steps=steps)
    return LineDisplay(step=step, steps=steps)


class LiveDisplay:
    """One bar that stays at the bottom; evaluations and saves are printed above it."""

    def __init__(self, console: Console, *, step: int, steps: int) -> None:
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=step)
        self._bar.start()

    def write(self, record: dict[str, Any]) -> None:
        if record["event"] == "step":
            self._bar.update(self._task, completed=record["step"], description=describe(record))
        else:
            self._bar.console.print(f"{record['event']}: {describe(record)}")

    def close(self) -> None:
        self._bar.stop()


class LineDisplay:
    """One line per record."""

    def __init__(self, *, step: int, steps: int) -> None:
        self._first, self._steps = step, steps
        self._start = time.monotonic()

    def write(self, record: dict[str, Any]) -> None:
        step = record["step"]
        line = f"{record['event']} {step}/{self._steps}  {describe(record)}"
        if record["event"] == "step" and step > self._first:
            per_step = (time.monotonic() - self._start) / (step - self._first)
            line += f"  ETA {_clock(per_step * (self._steps - step))}"
        print(line, flush=True)

    def close(self) -> None:
        pass


FORMATS = {  # what is shown of a record, in this order
    "loss": "loss {:.4f}",
    "mtp_loss_1": "mtp {:.4f}",
    "balance_loss": "balance {:.3f}",
    "device_balance_loss": "devices {:.3f}",
    "communication_balance_loss": "communication {:.3f}",
    "perplexity": "perplexity {:.2f}",
    "bits_per_byte": "{:.3f} bits/byte",
    "unigram_entropy": "(unigram entropy {:.4f})",
    "grad_norm": "norm {:.3f}",
    "lr": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tok/s",
    "flops_per_second": "{:.2e} FLOP/s",
    "mfu": "MFU {:.1%}",
    "memory_bytes": "{} peak",
    "max_vio": "MaxVio {:.2f}",
    "dead_experts": "{} dead",
    "samples": "sample {:,}",
    "skipped": "skipped {}",
    "layer": "{}",
    "drift": "off by {:.3f} in FP8",
    "path": "{}",
    "seconds": "{:.1f} s",
}


def describe(record: dict[str, Any]) -> str:
    """The record's numbers in one line; `skipped` only once there is something to tell."""
    shown = {key: record[key] for key in FORMATS if key in record}
    if not shown.get("skipped"):
        shown.pop("skipped", None)
    if "memory_bytes" in shown:
        shown["memory_bytes"] = f"{shown['memory_bytes'] / 2**30:.2f} GiB"
    return "  ".join(FORMATS[key].format(value) for key, value in shown.items())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
