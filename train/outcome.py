"""How a run ended, for whoever started it."""

import json
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path

from data.atomic_file import write_json

OUTCOME_FILE = "outcome.json"


class ExitCode(IntEnum):
    FINISHED = 0
    FAILED = 1
    MISTAKE = 2  # the user's: config or input; nothing was started
    INTERRUPTED = 75  # saved; start the same command again (EX_TEMPFAIL of sysexits.h)
    STALLED = 76  # a rank's: no step ended; RUN/stalls says why


class Status(StrEnum):
    finished = "finished"
    interrupted = "interrupted"
    failed = "failed"


@dataclass(slots=True, kw_only=True)
class Outcome:
    status: Status
    step: int
    reason: str = ""
    is_final: bool = False  # another start would fail the same way
    at_fault: list[int] = field(default_factory=list)  # ranks, where that is known
    summary: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> ExitCode:
        return {
            Status.finished: ExitCode.FINISHED,
            Status.interrupted: ExitCode.INTERRUPTED,
            Status.failed: ExitCode.FAILED,
        }[self.status]


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    write_json(run_dir / OUTCOME_FILE, asdict(outcome))


def read_outcome(run_dir: Path) -> Outcome | None:
    """The outcome of the last start, or None where the ranks died without leaving one."""
    try:
        values = json.loads((run_dir / OUTCOME_FILE).read_text())
    except FileNotFoundError:
        return None
    return Outcome(**{**values, "status": Status(values["status"])})
