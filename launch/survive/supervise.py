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
from pathlib import Path
from queue import Queue

from launch.nodes.link import Event
from launch.settings.config import LaunchedRun
from launch.start.starters import Attempt, Ready, Starter
from launch.survive.supervision import backoff
from launch.survive.timeline import Timeline, read_timeline
from launch.survive.watch import Failure, Watch, end_all
from train.checkpoint.checkpoints import Checkpoints
from train.config import check_run
from train.interrupt import on_stop_signal
from train.outcome import OUTCOME_FILE, Outcome, Status, read_outcome
from train.watch.stall import read_explanation

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2


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
        self.last_failure: Failure | None = None
        self.is_stopping = False

    def run(self) -> Outcome:
        """Start and start again until the run is finished, stopped, or beyond help."""
        attempt = max((moment.attempt for moment in read_timeline(self.run_dir)), default=0)
        fruitless = 0
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
        if self.is_stopping:
            return Outcome(status=Status.interrupted, step=-1, reason="a signal"), None
        if nodes is None:
            return none, Failure("too few nodes answer")
        (self.run_dir / OUTCOME_FILE).unlink(missing_ok=True)
        events: Queue[Event] = Queue()
        attempt = Attempt(self.run_dir, self.run_id, number, nodes, self.config.launch)
        links = self.starter.start(attempt, events, self._hear)
        watch = Watch(
            links,
            events,
            self.rules,
            self.timeline,
            attempt=number,
            grace_seconds=self.config.launch.grace_seconds,
            after=self.last_failure,
        )
        names = attempt.hosts
        ranks = len(nodes) * self.config.launch.processes
        text = f"{ranks} ranks on {', '.join(names)}, from step {max(self._newest_step(), 0)}"
        self.timeline.note("started", text, attempt=number, hosts=names)
        try:
            failure = watch.until_over(lambda: self.is_stopping)
        finally:
            end_all(links, self.rules)
        outcome = read_outcome(self.run_dir)
        stall = read_explanation(self.run_dir, attempt=number)
        if outcome is not None and outcome.status is not Status.failed:
            return outcome, None
        if self.is_stopping and outcome is None:
            reason = "stopped before the ranks had saved" + (
                f": {failure.reason}" if failure else ""
            )
            return Outcome(status=Status.interrupted, step=-1, reason=reason), None
        noticed = failure.time if failure is not None else time.time()
        if stall is not None:
            return none, Failure(stall.summary, attempt.hosts_of(stall.missing), time=noticed)
        if outcome is not None and (outcome.is_final or outcome.at_fault or failure is None):
            hosts = attempt.hosts_of(outcome.at_fault)
            failure = Failure(outcome.reason, hosts, is_final=outcome.is_final, time=noticed)
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

    def _blame(self, failure: Failure, attempt: int) -> None:
        self.last_failure = failure
        self.timeline.note(
            "failed", failure.reason, attempt=attempt, hosts=failure.hosts, at=failure.time
        )
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
        with suppress(OSError, ValueError):  # a terminal that is gone must not end the listener
            print(line, end="", flush=True)
        path = self.run_dir / "logs" / f"node-{host or 'all'}.log"
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(line)


def _describe(outcome: Outcome) -> str:
    return f"at step {outcome.step}" + (f": {outcome.reason}" if outcome.reason else "")
