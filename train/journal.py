"""The run's record: a JSONL file always, the terminal, and wandb when configured."""

import json
import logging
import math
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

from data.atomic_file import write_aside
from train.display import open_display

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb-id"

Record = dict[str, Any]
"""One line of the journal: `event` (step, evaluation, checkpoint, ...), `step`, and numbers."""


class WandbMode(StrEnum):
    online = "online"
    offline = "offline"  # files in the run's folder; needs no account


@dataclass(slots=True, kw_only=True)
class LoggingConfig:
    #: Steps between records (reading a step's numbers waits for the device).
    every: int = 10
    #: Project on wandb; null leaves wandb out. The key comes from the environment, as usual.
    wandb_project: str | None = None
    #: Whether wandb sends records as they come or keeps them in the run's folder.
    wandb_mode: WandbMode = WandbMode.online


def check_logging(config: LoggingConfig) -> None:
    """Refuse, with a ValueError, an interval of nothing."""
    if config.every < 1:
        raise ValueError(f"logging.every={config.every} must be at least 1")


class Sink(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Journal:
    """Writes each record to all sinks."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """One JSON object per line, flushed, so that others can follow; null where not finite."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Lines beyond the step that the run resumes from are dropped: they happen again."""
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= resumed_step]
            with write_aside(path) as file:
                file.write("".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a")
        self._is_broken = False

    def write(self, record: Record) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        try:
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end the training
            if not self._is_broken:
                log.warning("%s: %s; records are lost until that is mended", self._file.name, error)
            self._is_broken = True

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


class Wandb:
    """The numbers of each record, under the same names; a resumed run continues its own.

    Raises:
        ValueError: wandb can't be reached or knows no key.
    """

    def __init__(self, config: LoggingConfig, *, run_dir: Path, about: dict[str, Any]) -> None:
        import wandb  # a second, which only its users pay

        self._step = 0
        id_file = run_dir / WANDB_ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                mode=config.wandb_mode.value,
                dir=run_dir,
                id=id_file.read_text(),
                name=str(run_dir),
                resume="allow",
                config=about,
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"logging.wandb_project={config.wandb_project}: wandb says: {error}; log in "
                "(wandb login, or WANDB_API_KEY), or set logging.wandb_mode=offline"
            ) from error

    def write(self, record: Record) -> None:
        numbers = {
            f"{record['event']}/{key}": value
            for key, value in record.items()
            if isinstance(value, int | float) and key != "step"
        }
        # A checkpoint's record comes when it is on disk, steps later; wandb only goes forward.
        self._step = max(self._step, record["step"])
        self._run.log(numbers, step=self._step)

    def close(self) -> None:
        self._run.finish()


def open_journal(
    config: LoggingConfig, *, run_dir: Path, step: int, steps: int, about: dict[str, Any]
) -> Journal:
    """The journal of a run that stands at `step` of `steps`; `about` describes it to wandb."""
    sinks: list[Sink] = [
        JsonLines(run_dir / METRICS_FILE, resumed_step=step),
        open_display(step=step, steps=steps),
    ]
    if config.wandb_project is not None:
        sinks.append(Wandb(config, run_dir=run_dir, about=about))
    return Journal(sinks)


def read_records(run_dir: Path, *, event: str) -> list[Record]:
    """The records of one kind, in order."""
    path = run_dir / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if _step(line) < float("inf")]
    return [record for record in records if record["event"] == event]


def _step(line: str) -> float:
    """The step of a line; infinity for a line cut short by a kill, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
