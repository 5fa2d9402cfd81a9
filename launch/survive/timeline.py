"""What happened to a run, as one line per event in its folder, readable by people and programs."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

log = logging.getLogger(__name__)

TIMELINE_FILE = "timeline.jsonl"


@dataclass(slots=True, kw_only=True)
class Moment:
    time: float  # seconds since 1970
    event: str  # started, training, failed, restarting, excluded, swept, waiting, finished, ...
    text: str
    attempt: int = 0
    hosts: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line for a person."""
        clock = datetime.fromtimestamp(self.time).strftime("%Y-%m-%d %H:%M:%S")
        attempt = f"start {self.attempt}" if self.attempt else ""
        return f"{clock}  {attempt:8}  {self.event:10}  {self.text}"


class Timeline:
    """Appends moments to the run's file and tells the terminal."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / TIMELINE_FILE

    def note(
        self,
        event: str,
        text: str,
        *,
        attempt: int = 0,
        hosts: list[str] | None = None,
        at: float | None = None,  # seconds since 1970; null: now
    ) -> None:
        moment = Moment(
            time=time.time() if at is None else at,
            event=event,
            text=text,
            attempt=attempt,
            hosts=hosts or [],
        )
        line = json.dumps(asdict(moment))
        log.info("%s", moment.describe())
        with suppress(OSError), self.path.open("a") as file:  # a full disk must not end the watch
            file.write(line + "\n")


def read_timeline(run_dir: Path) -> Iterator[Moment]:
    """The moments so far, oldest first; a line cut short by a kill is left out."""
    path = run_dir / TIMELINE_FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError):
            yield Moment(**json.loads(line))
