"""Keeping a run alive unattended: start, watch, end promptly, find out who failed, start again.

A start's outcome is what its first rank wrote into the run's folder, never an exit code. Ranks
continue from the newest good checkpoint by themselves, in any layout, so a start needs no more than
a set of nodes that answer.
"""

import logging
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue

from launch.config import LaunchedRun
from launch.link import Event, Link
from launch.starters import Attempt, Ready, Starter
from launch.supervision import backoff
from launch.timeline import Timeline
from train.checkpoint import Checkpoints
from train.config import check_run
from train.interrupt import on_stop_signal
from train.outcome import OUTCOME_FILE, ExitCode, Outcome, Status, read_outcome
from train.stall import read_explanation

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
WORD_SECONDS = 2.0  # between signs of life to the agents
END_SECONDS = 10.0  # that killed nodes get to report before their links are cut
# A rank's death breaks the others' collectives. Where they are seen to end first, the death itself
# is reported within this time.
CAUSE_SECONDS = 5.0
ABORTS = ("SIGTERM", "SIGABRT")  # how ranks end that only noticed another's death


@dataclass(slots=True)
class Failure:
    """Why a start ended before the run did."""

    reason: str
    hosts: list[str] = field(default_factory=list)  # at fault, as far as that is known
    is_final: bool = False  # another start would fail the same way
    may_be_echo: bool = False  # of another rank's death


class Supervisor:
    """One launch: its starts, its nodes' failures, its timeline."""

    def __init__(self, config: LaunchedRun, starter: Starter) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.starter = starter
        self.rules = config.launch.supervision
        self.timeline = Timeline(self.run_dir)
        self.run_id = uuid.uuid4().hex[:12]
        self.failures: Counter[str] = Counter()  # by host
        self.is_stopping = False

    def run(self) -> Outcome:
        """Start and start again until the run is finished, stopped, or beyond help."""
        attempt = fruitless = 0
        with on_stop_signal(self.stop):
            while True:
                attempt += 1
                reached = self._newest_step()
                outcome, failure = self._try(attempt)
                if failure is None:
                    self.timeline.note(str(outcome.status), _describe(outcome), attempt=attempt)
                    return outcome
                self._blame(failure, attempt)
                fruitless = fruitless + 1 if self._newest_step() <= reached else 1
                gives_up = failure.is_final or fruitless > self.rules.max_restarts
                if gives_up or self.is_stopping:
                    self.timeline.note("given up", failure.reason, attempt=attempt)
                    return Outcome(status=Status.failed, step=-1, reason=failure.reason)
                self._wait(backoff(self.rules, fruitless), attempt)

    def stop(self) -> None:
        """A signal to this process: the ranks save and end, and nothing is started again."""
        self.is_stopping = True

    def _try(self, number: int) -> tuple[Outcome, Failure | None]:
        """One start, from choosing nodes to the end of the last process of it."""
        none = Outcome(status=Status.failed, step=-1)
        nodes = self._choose(self.starter.find_ready())
        if nodes is None:
            if self.is_stopping:
                return Outcome(status=Status.interrupted, step=-1, reason="a signal"), None
            return none, Failure("too few nodes answer")
        (self.run_dir / OUTCOME_FILE).unlink(missing_ok=True)
        events: Queue[Event] = Queue()
        attempt = Attempt(self.run_dir, self.run_id, number, nodes, self.config.launch)
        links = self.starter.start(attempt, events, self._hear)
        names = [node.host for node in nodes]
        ranks = len(nodes) * self.config.launch.processes
        text = f"{ranks} ranks on {', '.join(names)}, from step {max(self._newest_step(), 0)}"
        self.timeline.note("started", text, attempt=number, hosts=names)
        try:
            failure = self._watch(links, events)
        finally:
            _end_all(links)
        outcome = read_outcome(self.run_dir)
        stall = read_explanation(self.run_dir, attempt=number)
        if outcome is not None and outcome.status is not Status.failed:
            return outcome, None
        if self.is_stopping and outcome is None:
            reason = "stopped before the ranks had anything to save"
            return Outcome(status=Status.interrupted, step=-1, reason=reason), None
        if stall is not None:
            return none, Failure(stall.summary, attempt.hosts_of(stall.missing))
        if outcome is not None and (outcome.is_final or outcome.at_fault or failure is None):
            hosts = attempt.hosts_of(outcome.at_fault)
            return none, Failure(outcome.reason, hosts, is_final=outcome.is_final)
        return none, failure or Failure("the ranks ended without leaving an outcome")

    def _choose(self, ready: list[Ready]) -> list[Ready] | None:
        """The nodes of the next start: as many as configured, or as few as are allowed and fit."""
        launch = self.config.launch
        good = [node for node in ready if self.failures[node.host] < self.rules.max_node_failures]
        fewest = self.rules.min_nodes or launch.nodes
        for count in range(min(len(good), launch.nodes), fewest - 1, -1):
            with suppress(ValueError):
                check_run(self.config, num_ranks=count * launch.processes)
                return good[:count]
        left_out = sorted({node.host for node in ready} - {node.host for node in good})
        self.timeline.note(
            "waiting",
            f"{len(good)} of {launch.nodes} nodes are usable (at least {fewest} are needed; "
            f"answering: {', '.join(node.host for node in ready) or 'none'}"
            + (f"; left out after failures: {', '.join(left_out)})" if left_out else ")"),
        )
        return None

    def _watch(self, links: list[Link], events: "Queue[Event]") -> Failure | None:
        """Until a node fails or is lost: why; None where all ranks ended by themselves."""
        told = 0.0
        asked = False
        while True:
            if self.is_stopping and not asked:
                asked = True
                log.warning("stopping: the ranks finish their step and save")
                for link in links:
                    link.say("stop")
            if time.monotonic() - told > WORD_SECONDS:
                told = time.monotonic()
                for link in links:
                    link.say("alive")
            try:
                event = events.get(timeout=POLL_SECONDS)
            except Empty:
                limit = self.rules.lost_after_seconds
                lost = [host for link in links for host in link.find_silent(limit)]
                if lost:
                    return Failure(f"nothing was heard of {', '.join(lost)}", lost)
                continue
            failure = self._judge(event)
            if failure is not None:
                return self._find_cause(failure, links, events)
            if all(link.is_over for link in links):
                return None

    def _find_cause(self, first: Failure, links: list[Link], events: "Queue[Event]") -> Failure:
        """The failure that the others followed from; the first one where none stands out."""
        deadline = time.monotonic() + CAUSE_SECONDS
        failure: Failure | None = first
        while failure is None or failure.may_be_echo:
            is_over = all(link.is_over for link in links)
            left = 0.0 if is_over else max(deadline - time.monotonic(), 0.0)
            try:
                failure = self._judge(events.get(timeout=min(left, POLL_SECONDS)))
            except Empty:
                if not left:
                    return first
        return failure

    def _judge(self, event: Event) -> Failure | None:
        """What an event means for the start; None where it goes on."""
        values = event.values
        match event.name:
            case "swept":
                text = f"{event.host}: killed {values['processes']} processes of an earlier start"
                self.timeline.note("swept", text)
            case "alone":
                return Failure(f"{event.host} lost its link to the launcher", [event.host])
            case "closed" if not values["is_over"]:
                reason = f"the link to {event.host} broke (exit code {values['code']})"
                return Failure(reason, [event.host])
            case "ended":
                return _judge_end(event)
        return None

    def _blame(self, failure: Failure, attempt: int) -> None:
        self.timeline.note("failed", failure.reason, attempt=attempt, hosts=failure.hosts)
        for host in failure.hosts:
            self.failures[host] += 1
            if self.failures[host] == self.rules.max_node_failures:
                text = f"{host} failed {self.failures[host]} times and is left out"
                self.timeline.note("excluded", text, attempt=attempt, hosts=[host])

    def _wait(self, seconds: float, attempt: int) -> None:
        if seconds:
            self.timeline.note("restarting", f"in {seconds:g} s", attempt=attempt)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.is_stopping:
            time.sleep(min(POLL_SECONDS, seconds))

    def _newest_step(self) -> int:
        steps = Checkpoints(self.run_dir, keep=1).steps()
        return steps[-1] if steps else -1

    def _hear(self, host: str, line: str) -> None:
        """A line that a node's ranks printed: to the terminal, and to the node's log."""
        print(line, end="", flush=True)
        path = self.run_dir / "logs" / f"node-{host or 'all'}.log"
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(line)


def _judge_end(event: Event) -> Failure | None:
    """A node's ranks have ended: a failure unless they ended as ranks do that agree on it."""
    code, number = event.values["code"], event.values["signal"]
    if code in (ExitCode.FINISHED, ExitCode.INTERRUPTED):
        return None
    where = f"on {event.host}" if event.host else "somewhere"
    what = f"was killed by {number}" if number else f"ended with code {code}"
    hosts = [event.host] if event.host else []
    may_be_echo = number in ABORTS if number else code != ExitCode.STALLED
    return Failure(f"a rank {where} {what}", hosts, may_be_echo=may_be_echo)


def _end_all(links: list[Link]) -> None:
    """No process of the start is left, as far as its nodes can be reached."""
    for link in links:
        link.say("kill")
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline and any(link.process.poll() is None for link in links):
        time.sleep(POLL_SECONDS)
    for link in links:
        link.end()


def _describe(outcome: Outcome) -> str:
    return f"at step {outcome.step}" + (f": {outcome.reason}" if outcome.reason else "")
