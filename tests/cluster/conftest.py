"""Three hosts for the tests of this folder, and what a launch on them needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, missing_tools
from tests.cluster.launches import SETTINGS, Losses, Recovery, read_losses
from tests.command import thrifty

RECOVERIES = pytest.StashKey[list[Recovery]]()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all hosts see the same files."""
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="session")
def private(folder: Path) -> Path:
    """A folder that every host has for itself."""
    path = folder / "private"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def hosts(folder: Path, private: Path) -> Iterator[Hosts]:
    """th1, th2 and th3, each with sshd; the tests' commands run on th1."""
    missing = missing_tools()
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (make cluster-tools)")
    with Hosts(folder / "hosts", count=3, private=[private]) as started:
        yield started


@pytest.fixture(scope="session")
def settings(folder: Path) -> list[str]:
    """A run of a few hundred steps of milliseconds over a corpus that is ready."""
    text = folder / "text"
    text.mkdir()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        (text / f"{path.stem}.txt").write_text(path.read_text())
    given = [*SETTINGS, f"data.folder={folder / 'corpus'}", f"data.paths=['{text}/*.txt']"]
    code, output = thrifty("prepare", *given, cwd=folder)
    assert code == 0, output
    return given


@pytest.fixture(scope="session")
def undisturbed(folder: Path, settings: list[str]) -> Losses:
    """The losses of the same run on two ranks of one machine, EP 2, without any fault."""
    run_dir = folder / "undisturbed"
    code, output = thrifty(
        *("train", *settings, f"run_dir={run_dir}"),
        *("launch.processes=2", "parallel.expert=2", "watchdog.factor=0"),
        cwd=folder,
    )
    assert code == 0, output
    return read_losses(run_dir)


@pytest.fixture(scope="session")
def recoveries(pytestconfig: pytest.Config) -> list[Recovery]:
    """What the tests measured; printed at the end of the session."""
    return pytestconfig.stash.setdefault(RECOVERIES, [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """From a failure to training again, for each kind of fault."""
    measured = config.stash.get(RECOVERIES, [])
    if not measured:
        return
    write = terminalreporter.write_line
    terminalreporter.section("seconds from a fault to training again")
    write(f"{'fault':34}{'noticed':>9}{'restarted':>11}{'first step':>12}{'in all':>9}")
    for one in measured:
        times = f"{one.noticed:9.1f}{one.started:11.1f}{one.trained:12.1f}{sum(one[1:]):9.1f}"
        write(f"{one.fault:34}{times}")
