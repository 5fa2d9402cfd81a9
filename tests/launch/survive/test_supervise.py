"""Who is named when a start fails, whatever order the nodes' words come in; who starts again."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from queue import Queue

import pytest

from launch.nodes.agent import MARK
from launch.nodes.link import AgentLink, Event, Hear, JobLink, Link
from launch.settings.config import LaunchedRun
from launch.start.starters import Attempt, Ready
from launch.survive.supervise import Supervisor
from launch.survive.timeline import read_timeline
from tests.command import compose
from train.outcome import Status

NODES = ["node1", "node2"]
ERROR = 'sleep {seconds}; echo \'{mark}{{"event": "ended", "code": 1, "signal": null}}\''
KILLED = 'sleep {seconds}; echo \'{mark}{{"event": "ended", "code": -9, "signal": "SIGKILL"}}\''
HALF_A_LINE = "printf 'step 30/120  loss 4.4'; " + KILLED
GONE = "sleep {seconds}; exit 255"


class ScriptedNodes:
    """Nodes whose agents are lines of shell, the same at every start."""

    def __init__(self, scripts: list[str]) -> None:
        self.scripts = dict(zip(NODES, scripts, strict=True))

    def find_ready(self) -> list[Ready]:
        return [Ready(name, "127.0.0.1", 1) for name in NODES]

    def start(self, attempt: Attempt, events: "Queue[Event]", hear: Hear) -> list[Link]:
        processes = [
            subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for command in self.commands(attempt)
        ]
        return [
            AgentLink(node.host, process, events, hear)
            for node, process in zip(attempt.nodes, processes, strict=True)
        ]

    def commands(self, attempt: Attempt) -> list[list[str]]:
        return [
            ["sh", "-c", f"exec 2>/dev/null; {self.scripts[node.host]}"] for node in attempt.nodes
        ]


@pytest.fixture(scope="module")
def config() -> LaunchedRun:
    return compose(
        *("experiment=smoke", "launch=ssh", "launch.hosts=[node1,node2]", "launch.nodes=2"),
        "launch.supervision.max_restarts=0",
    )


@pytest.mark.parametrize(
    ("scripts", "reason", "host"),
    [
        ([(ERROR, 0), (KILLED, 0.5)], "a rank on node2 was killed by SIGKILL", "node2"),
        ([(KILLED, 0.5), (ERROR, 0)], "a rank on node1 was killed by SIGKILL", "node1"),
        ([(ERROR, 0), (GONE, 0.5)], "the link to node2 broke (exit code 255)", "node2"),
        ([(ERROR, 0), (ERROR, 1.5)], "a rank on node1 ended with code 1", "node1"),
        ([(HALF_A_LINE, 0), (ERROR, 0)], "a rank on node1 was killed by SIGKILL", "node1"),
    ],
)
def test_the_death_is_named_that_the_others_followed_from(
    config: LaunchedRun, tmp_path: Path, scripts: list[tuple[str, float]], reason: str, host: str
) -> None:
    """Each node's ranks end as its script says, after so many seconds."""
    nodes = [script.format(seconds=seconds, mark=MARK) for script, seconds in scripts]
    Supervisor(replace(config, run_dir=str(tmp_path)), ScriptedNodes(nodes)).run()
    (failed,) = [moment for moment in read_timeline(tmp_path) if moment.event == "failed"]
    assert (failed.text, failed.hosts) == (reason, [host])


def test_a_stop_while_nodes_are_asked_starts_nothing(config: LaunchedRun, tmp_path: Path) -> None:
    class StoppedWhenAsked(ScriptedNodes):
        def find_ready(self) -> list[Ready]:
            supervisor.stop()
            return super().find_ready()

    supervisor = Supervisor(
        replace(config, run_dir=str(tmp_path)), StoppedWhenAsked(["exit 1", "exit 1"])
    )
    assert supervisor.run().status is Status.interrupted
    assert [moment.event for moment in read_timeline(tmp_path)] == ["interrupted"]


HARD_OF_HEARING = (
    'while [ "$count" != xx ] && read word; do [ "$word" = stop ] && count=x$count; done; '
    'echo \'{mark}{{"event": "ended", "code": 75, "signal": null}}\''
)


def test_a_stop_is_said_again_until_it_is_heard(config: LaunchedRun, tmp_path: Path) -> None:
    """Ranks that were not there when it was first said missed it."""

    class StoppedAtOnce(ScriptedNodes):
        def start(self, attempt: Attempt, events: "Queue[Event]", hear: Hear) -> list[Link]:
            supervisor.stop()
            return super().start(attempt, events, hear)

    nodes = StoppedAtOnce([HARD_OF_HEARING.format(mark=MARK)] * 2)
    rules = replace(config.launch.supervision, grace_seconds=20)
    given = replace(config, run_dir=str(tmp_path), launch=replace(config.launch, supervision=rules))
    supervisor = Supervisor(given, nodes)
    outcome = supervisor.run()
    assert outcome.status is Status.interrupted
    assert outcome.reason == "stopped before the ranks had saved"


def test_nodes_hear_that_the_launcher_lives_while_a_cause_is_looked_for(
    config: LaunchedRun, tmp_path: Path
) -> None:
    """Node 2's ranks may end a while after node 1's: an agent that hears nothing kills its own."""
    heard = tmp_path / "heard"
    listen = f'while [ "$word" != kill ] && read word; do echo $word >> {heard}; done'
    nodes = [ERROR.format(seconds=0, mark=MARK), listen]
    Supervisor(replace(config, run_dir=str(tmp_path)), ScriptedNodes(nodes)).run()
    assert heard.read_text().split().count("alive") >= 2


def test_a_job_is_asked_to_stop_now_and_then_and_killed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = subprocess.Popen(["true"], text=True, stdout=subprocess.PIPE)
    words: list[str] = []
    link = JobLink([], process, Queue(), lambda host, line: None, signal_ranks=words.append)
    for word in ("alive", "stop", "stop", "kill", "kill"):
        link.say(word)
    assert words == ["stop", "kill", "kill"]
    monkeypatch.setattr("launch.nodes.link.STOP_SECONDS", 0.0)
    link.say("stop")
    assert words[3:] == ["stop"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("closed file")])
def test_a_terminal_that_is_gone_ends_no_run(
    config: LaunchedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class DeadTerminal(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stdout", DeadTerminal())
    nodes = [script.format(seconds=0, mark=MARK) for script in (HALF_A_LINE, ERROR)]
    Supervisor(replace(config, run_dir=str(tmp_path)), ScriptedNodes(nodes)).run()
    (failed,) = [moment for moment in read_timeline(tmp_path) if moment.event == "failed"]
    assert failed.text == "a rank on node1 was killed by SIGKILL"
    assert (tmp_path / "logs/node-node1.log").read_text() == "step 30/120  loss 4.4\n"


def test_a_node_that_fails_twice_is_left_out_and_a_limit_ends_the_rest(
    config: LaunchedRun, tmp_path: Path
) -> None:
    rules = replace(
        config.launch.supervision,
        backoff_seconds=0,
        max_restarts=3,
        min_nodes=1,
        max_node_failures=2,
    )
    given = replace(config, run_dir=str(tmp_path), launch=replace(config.launch, supervision=rules))
    nodes = [script.format(seconds=0, mark=MARK) for script in (ERROR, KILLED)]
    outcome = Supervisor(given, ScriptedNodes(nodes)).run()
    assert outcome.status is Status.failed
    moments = list(read_timeline(tmp_path))
    started = [moment.hosts for moment in moments if moment.event == "started"]
    assert started == [["node1", "node2"], ["node1", "node2"], ["node1"], ["node1"]]
    assert [moment.hosts for moment in moments if moment.event == "excluded"] == [
        ["node2"],
        ["node1"],
    ]
    assert moments[-1].event == "given up"
    # A later launch in the same folder counts on: its stalls and logs are told from the old ones.
    Supervisor(replace(given, launch=config.launch), ScriptedNodes(nodes)).run()
    assert [moment.attempt for moment in read_timeline(tmp_path)][-1] == 5
