"""What a launch over ssh shows to others: no secret, no port too many, no shell to speak to."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.launches import finish, start, wait_for_step

pytestmark = pytest.mark.cluster

SECRET = "not-for-other-eyes"


class Seen(NamedTuple):
    """Of a run on two nodes, while it trained."""

    run_dir: Path
    command_lines: list[str]  # of every process of the machine
    environment: dict[str, str]  # of the second node's rank
    listeners: dict[str, list[str]]  # host to address:port of its TCP listeners
    output: str


@pytest.fixture(scope="module")
def seen(hosts: Hosts, settings: list[str], folder: Path) -> Seen:
    run_dir = folder / "a run; $(touch owned)"
    given = ["launch=ssh", "launch.nodes=2", "launch.hosts=[th1,th2]", "parallel.expert=2"]
    given += ["schedule.steps=100000", "launch.doctor.enabled=false", f"run_dir='{run_dir}'"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        before = os.umask(0o027)
        try:
            process = start(hosts, "launch", *settings, *given)
        finally:
            os.umask(before)
    wait_for_step(run_dir, 20, process)
    lines = []
    for other in psutil.process_iter():
        with suppress(psutil.Error):
            lines.append(" ".join(other.cmdline()))
    (rank,) = hosts.pids("th2", "train", str(run_dir))
    environment = psutil.Process(rank).environ()
    listeners = {
        name: [line.split()[3] for line in hosts.run(name, "ss", "-ltnH").splitlines()]
        for name in ("th1", "th2")
    }
    (pid,) = hosts.pids("th1", "launch.cli", f"run_dir='{run_dir}'")
    os.kill(pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    return Seen(run_dir, lines, environment, listeners, output)


def test_a_key_reaches_the_ranks_but_no_command_line_log_or_file(seen: Seen) -> None:
    assert seen.environment["WANDB_API_KEY"] == SECRET
    assert any("launch.nodes.agent" in line for line in seen.command_lines)
    assert [line for line in seen.command_lines if SECRET in line] == []
    assert SECRET not in seen.output
    files = [path for path in seen.run_dir.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_name_that_a_shell_would_obey_is_only_a_name(seen: Seen) -> None:
    assert (seen.run_dir / "metrics.jsonl").is_file()
    places = [Path.cwd(), Path.home(), seen.run_dir.parent, seen.run_dir]
    assert [place for place in places if (place / "owned").exists()] == []


def test_files_obey_the_umask(seen: Seen) -> None:
    """Of the launcher's own; the ranks' are made under the umask of the nodes' logins."""
    for name in ("config.yaml", "timeline.jsonl", "logs/node-th1.log"):
        assert (seen.run_dir / name).stat().st_mode & 0o777 == 0o640, name


def test_only_sshd_the_meeting_point_and_the_ranks_own_sockets_listen(seen: Seen) -> None:
    """torch's store listens on every address of the first node, gloo on the chosen interface."""
    for name, address in (("th1", "10.77.0.1"), ("th2", "10.77.0.2")):
        others = [where for where in seen.listeners[name] if not where.endswith(":22")]
        everywhere = [where for where in others if not where.startswith(address)]
        assert len(everywhere) <= (1 if name == "th1" else 0), others
        assert all(re.match(r"(\*|\[::\]|0\.0\.0\.0):\d+$", where) for where in everywhere)
