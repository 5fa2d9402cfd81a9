"""The launcher's end of a node: a process (an agent here or behind ssh), its events, its words."""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Queue
from typing import Any, NamedTuple, Protocol

from launch.agent import MARK


class Event(NamedTuple):
    """Something that a node told, or that was noticed of it."""

    host: str
    name: str  # started, alive, swept, alone, ended (the agent's), closed (the link's end)
    values: dict[str, Any]


class Link(Protocol):
    """A node, or all nodes at once where somebody else (srun, mpirun) starts them."""

    @property
    def hosts(self) -> list[str]: ...

    def say(self, word: str) -> None: ...

    def poll(self) -> int | None: ...

    def end(self) -> None: ...


@dataclass(slots=True)
class AgentLink:
    """One node's agent. Its events go to `events`, the ranks' words to `hear`, line by line."""

    host: str
    process: subprocess.Popen[str]
    events: "Queue[Event]"
    hear: Callable[[str, str], None]  # host, line
    heard: float = field(default_factory=time.monotonic)  # when the node last said anything
    has_spoken: bool = False
    has_ended: bool = False  # the agent has told the end of its ranks

    def __post_init__(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def hosts(self) -> list[str]:
        return [self.host]

    def say(self, word: str) -> None:
        """A word to the agent; one that is gone hears nothing."""
        assert self.process.stdin is not None, "opened as a pipe"
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()

    def poll(self) -> int | None:
        return self.process.poll()

    def end(self) -> None:
        """Give the node up: end the process here, whatever goes on there."""
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None, "opened as a pipe"
        for line in self.process.stdout:
            self.heard, self.has_spoken = time.monotonic(), True
            event = _parse(line)
            if event is None:
                self.hear(self.host, line)
            else:
                name = event.pop("event")
                self.has_ended = self.has_ended or name == "ended"
                self.events.put(Event(self.host, name, event))
        self.events.put(Event(self.host, "closed", {"code": self.process.wait()}))


@dataclass(slots=True)
class JobLink:
    """All nodes behind one process of somebody else's. Signals reach the ranks through it."""

    hosts: list[str]
    process: subprocess.Popen[str]
    events: "Queue[Event]"
    hear: Callable[[str, str], None]

    def __post_init__(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, word: str) -> None:
        if word == "stop":
            self.process.terminate()
        elif word == "kill":
            self.process.kill()

    def poll(self) -> int | None:
        return self.process.poll()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None, "opened as a pipe"
        for line in self.process.stdout:
            self.hear("", line)
        code = self.process.wait()
        self.events.put(Event("", "ended", {"code": code, "signal": None}))


def _parse(line: str) -> dict[str, Any] | None:
    """The event in a line; None for anything else, and for an event that was cut in two."""
    if not line.startswith(MARK):
        return None
    with contextlib.suppress(ValueError):
        event = json.loads(line.removeprefix(MARK))
        if isinstance(event, dict) and "event" in event:
            return event
    return None
