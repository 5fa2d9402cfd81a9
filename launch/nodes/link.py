"""The launcher's end of a node: a process (an agent here or behind ssh), its events, its words."""

import contextlib
import json
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from queue import Queue
from typing import Any, NamedTuple

from launch.nodes.agent import MARK

FIRST_WORD_SECONDS = 60.0  # that a node may take to start its Python
STOP_SECONDS = 10.0  # between two requests to stop that each cost a round of ssh or a scancel

Hear = Callable[[str, str], None]  # takes the host (empty where that is not known) and a line


class Event(NamedTuple):
    """Something that a node told, or that was noticed of it."""

    host: str
    name: str  # started, alive, swept, alone, ended (the agent's), closed (the link's end)
    values: dict[str, Any]


class Link(ABC):
    """A process behind which ranks run. What it prints is heard line by line, in a thread."""

    def __init__(
        self, hosts: list[str], process: subprocess.Popen[str], events: "Queue[Event]", hear: Hear
    ) -> None:
        self.hosts = hosts
        self.process = process
        self.events = events
        self.hear = hear
        threading.Thread(target=self._listen, daemon=True).start()

    @abstractmethod
    def say(self, word: str) -> None:
        """`stop` (save and end), `kill`, or `alive`."""

    @property
    def is_over(self) -> bool:
        """Whether its ranks have ended."""
        return self.process.poll() is not None

    def find_silent(self, limit: float) -> list[str]:  # noqa: ARG002 (nothing is known of nodes)
        """Hosts of which nothing has been heard for longer than `limit` seconds."""
        return []

    def end(self) -> None:
        """Give it up: end the process here, whatever goes on there."""
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None, "opened as a pipe"
        for line in self.process.stdout:
            self._take(line)
        self._close(self.process.wait())

    def _take(self, line: str) -> None:
        self.hear("", line)

    def _close(self, code: int) -> None:
        self.events.put(Event("", "ended", {"code": code, "signal": None}))


class AgentLink(Link):
    """One node's agent, which tells events among the ranks' words."""

    def __init__(
        self, host: str, process: subprocess.Popen[str], events: "Queue[Event]", hear: Hear
    ) -> None:
        self.host = host
        self.has_ended = False  # the agent has told the end of its ranks
        self._heard = time.monotonic()
        self._has_spoken = False
        super().__init__([host], process, events, hear)

    def say(self, word: str) -> None:
        """A word to the agent; one that is gone hears nothing."""
        assert self.process.stdin is not None, "opened as a pipe"
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()

    @property
    def is_over(self) -> bool:
        return self.has_ended

    def find_silent(self, limit: float) -> list[str]:
        if not self._has_spoken:
            limit = max(limit, FIRST_WORD_SECONDS)
        is_silent = not self.has_ended and time.monotonic() - self._heard > limit
        return [self.host] if is_silent else []

    def _take(self, line: str) -> None:
        self._heard, self._has_spoken = time.monotonic(), True
        words, event = split_line(line)
        if words:
            self.hear(self.host, words)
        if event is not None:
            name = event.pop("event")
            self.events.put(Event(self.host, name, event))
            self.has_ended = self.has_ended or name == "ended"

    def _close(self, code: int) -> None:
        self.events.put(Event(self.host, "closed", {"code": code, "is_over": self.has_ended}))


class JobLink(Link):
    """All nodes behind one process of somebody else's, and a way to the ranks around it."""

    def __init__(
        self,
        hosts: list[str],
        process: subprocess.Popen[str],
        events: "Queue[Event]",
        hear: Hear,
        *,
        signal_ranks: Callable[[str], None],
    ) -> None:
        self.signal_ranks = signal_ranks
        self._asked: float | None = None  # time.monotonic() of the last request to stop
        super().__init__(hosts, process, events, hear)

    def say(self, word: str) -> None:
        """`alive` is not passed on, nor a `stop` soon after another."""
        if word == "alive":
            return
        asked = self._asked
        if word == "stop" and asked is not None and time.monotonic() - asked < STOP_SECONDS:
            return
        self.signal_ranks(word)
        if word == "stop":
            self._asked = time.monotonic()


def split_line(line: str) -> tuple[str, dict[str, Any] | None]:
    """A rank's own words and the agent's event in a line.

    Both write into one pipe, and a rank writes a line in two parts: one that is killed between
    them, or is only slow, leaves the agent's event in the middle of a line.
    """
    words, mark, told = line.partition(MARK)
    if not mark:
        return line, None
    try:
        event, end = json.JSONDecoder().raw_decode(told)
    except ValueError:
        return line, None
    if not isinstance(event, dict) or "event" not in event:
        return line, None
    rest = told[end:]
    return words + (rest if words or rest.strip() else ""), event
