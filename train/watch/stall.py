"""Why a run does not go on: what every rank says of itself, and what follows from it together.

RUN/stalls/start-0002/rank-00000.json      one rank's own words
RUN/stalls/start-0002/explanation.json     what they come to; explanation.md for people
"""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.arrivals import ARRIVALS
from data.atomic_file import read_json, write_aside, write_json
from model.whereabouts import HERE

FOLDER = "stalls"
HEARTBEATS = "heartbeats"
EXPLANATION = "explanation.json"
COMPUTING = "computing"
DATA_WAIT = "data wait"
ATTEMPT_VARIABLE = "THRIFTY_ATTEMPT"  # in the environment of ranks: the number of their start


@dataclass(slots=True, kw_only=True)
class Statement:
    """One rank's own words: where it is and since when."""

    rank: int
    host: str
    pid: int
    step: int
    activity: str  # COMPUTING outside of every wait
    place: str = ""
    is_collective: bool = False
    number: int = 0  # of its collectives so far
    detail: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # in this activity
    silence: float | None = None  # seconds since data last came from behind a URL, if any did
    time: float = 0.0  # since 1970, when this was said
    attempt: int = 0  # the start that this process is of
    stacks: dict[str, str] = field(default_factory=dict)  # by thread

    def describe(self) -> str:
        where = f" of {self.place}" if self.place else ""
        detail = ", ".join(f"{name} {value}" for name, value in self.detail.items())
        return (
            f"rank {self.rank} ({self.host}) in step {self.step}: {self.activity}{where}, for "
            f"{self.seconds:.0f} s" + (f"; {detail}" if detail else "")
        )


@dataclass(slots=True, kw_only=True)
class Explanation:
    summary: str  # one line
    missing: list[int]  # ranks that the others wait for
    waiting: list[int]
    lines: list[str]


def take_statement(rank: int, *, with_stacks: bool) -> Statement:
    """Where this process is; called from the watchdog's thread."""
    activity = HERE.innermost()
    said = Statement(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        step=HERE.step,
        activity=COMPUTING,
        number=HERE.number,
        silence=ARRIVALS.seconds_ago(),
        time=time.time(),
        attempt=int(os.environ.get(ATTEMPT_VARIABLE, "0")),
    )
    if activity is not None:
        said.activity, said.place = activity.name, activity.place
        said.is_collective, said.number = activity.is_collective, activity.number
        said.detail, said.seconds = dict(activity.detail), time.monotonic() - activity.since
    if with_stacks:
        said.stacks = read_stacks()
    return said


def read_stacks() -> dict[str, str]:
    """Every Python thread's stack, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    }


def explain(
    said: Mapping[int, Statement], last_words: Mapping[int, Statement], *, num_ranks: int
) -> Explanation:
    """Whom the others wait for, from what each rank that can speak says.

    A rank without a word is stopped, dead or cut off: it is missing. If all speak, those are
    missing that are in no collective while others wait in one; if all wait, those that are behind
    (fewer collectives entered) are.
    """
    silent = [rank for rank in range(num_ranks) if rank not in said]
    waiting = [rank for rank, words in said.items() if words.is_collective]
    elsewhere = [rank for rank, words in said.items() if not words.is_collective]
    if silent:
        missing, why = silent, "without a word (stopped, dead or cut off)"
    elif elsewhere and waiting:
        missing, why = elsewhere, "elsewhere"
    elif elsewhere:
        missing, why = elsewhere, "waiting for no other rank"
    else:
        furthest = max(words.number for words in said.values())
        missing = [rank for rank, words in said.items() if words.number < furthest]
        why = "behind in the sequence of collectives"
        if not missing:
            why = "none: all ranks entered the same collective, which does not end (the network?)"
    waiting = [rank for rank in sorted(said) if rank not in missing]
    lines = [words.describe() for _, words in sorted(said.items())]
    for rank in silent:
        known = last_words.get(rank)
        before = "none before"
        if known is not None:
            before = f"{time.time() - known.time:.0f} s ago it said: {known.describe()}"
        lines.append(f"rank {rank}: no word; {before}")
    return Explanation(
        summary=_summarise(said, last_words, missing, waiting, why),
        missing=missing,
        waiting=waiting,
        lines=lines,
    )


def _summarise(
    said: Mapping[int, Statement],
    last_words: Mapping[int, Statement],
    missing: list[int],
    waiting: list[int],
    why: str,
) -> str:
    """The one line that a person reads first."""
    parts = []
    collectives = {
        (said[rank].activity, said[rank].place, said[rank].step)
        for rank in waiting
        if said[rank].is_collective
    }
    for name, place, step in sorted(collectives):
        ranks = [rank for rank in waiting if said[rank].activity == name]
        where = f" of {place}" if place else ""
        parts.append(f"{_name(ranks)} wait{'s' * (len(ranks) == 1)} in {name}{where}, step {step}")
    if not missing:
        return f"{'; '.join(parts)}; missing: {why}"
    absent = []
    for rank in missing:
        words = said.get(rank) or last_words.get(rank)
        host = f" on {words.host}" if words is not None else ""
        doing = f" ({words.activity})" if words is not None and rank in said else ""
        absent.append(f"rank {rank}{host}{doing}")
    return f"{'; '.join([*parts, 'missing: ' + ', '.join(absent)])}, {why}"


def _name(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def stall_folder(run_dir: Path, *, attempt: int) -> Path:
    return run_dir / FOLDER / f"start-{attempt:04}"


def write_statement(folder: Path, words: Statement) -> None:
    """One rank's file; a full disk or a lost file system is no reason to fail."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _file_name(words.rank), asdict(words))


def withdraw_statement(folder: Path, rank: int) -> None:
    """What an earlier start said there counts no longer."""
    for name in (_file_name(rank), *([EXPLANATION] if rank == 0 else [])):
        with suppress(OSError):
            (folder / name).unlink()


def read_last_words(run_dir: Path, *, rank: int) -> Statement | None:
    """The rank's last sign of life; None where it gave none, or while it is being replaced."""
    with suppress(OSError, ValueError, TypeError):
        return Statement(**read_json(run_dir / HEARTBEATS / _file_name(rank)))
    return None


def read_statements(folder: Path) -> dict[int, Statement]:
    """All ranks' files there, by rank; one that is cut short is left out."""
    found = {}
    for path in folder.glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError, KeyError):
            words = Statement(**read_json(path))
            found[words.rank] = words
    return found


def write_explanation(
    folder: Path, explanation: Explanation, said: Mapping[int, Statement]
) -> None:
    """For programs and for people, stacks included."""
    text = [f"# {explanation.summary}", "", *(f"- {line}" for line in explanation.lines)]
    for rank, words in sorted(said.items()):
        for thread, stack in words.stacks.items():
            text += ["", f"## rank {rank}, thread {thread}", "", "```", stack.rstrip(), "```"]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with write_aside(folder / "explanation.md") as file:
            file.write("\n".join([*text, ""]).encode())
        write_json(folder / EXPLANATION, asdict(explanation))


def _file_name(rank: int) -> str:
    return f"rank-{rank:05}.json"


def read_explanation(run_dir: Path, *, attempt: int) -> Explanation | None:
    """Why that start stalled; None where it did not."""
    with suppress(OSError, ValueError, TypeError):
        return Explanation(**read_json(stall_folder(run_dir, attempt=attempt) / EXPLANATION))
    return None
