"""Three hosts for the tests of this folder, and what a launch on them needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, missing_tools
from tests.cluster.launches import SETTINGS, Losses, read_losses
from tests.command import thrifty


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
        *("launch.processes=2", "parallel.expert=2"),
        cwd=folder,
        seconds=300,
    )
    assert code == 0, output
    return read_losses(run_dir)
