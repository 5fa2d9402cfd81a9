"""The same run by launchers that are not ours: DeepSpeed's over pdsh, Open MPI's, torchrun."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.launches import (
    SECONDS,
    Losses,
    finish,
    moments,
    read_losses,
    start,
    wait_for_step,
)

pytestmark = pytest.mark.cluster

TWO_NODES = ["launch.nodes=2", "parallel.expert=2", "launch.hosts=[th1,th2]"]


TOOLS = {"pdsh": "pdsh", "openmpi": "mpirun"}


@pytest.fixture(params=TOOLS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The option of the launch group."""
    chosen: str = request.param
    if shutil.which(TOOLS[chosen]) is None:
        pytest.skip(f"needs {TOOLS[chosen]} (make cluster-tools)")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    return chosen


def launch(hosts: Hosts, settings: list[str], run_dir: Path, kind: str) -> subprocess.Popen[str]:
    given = [*settings, f"launch={kind}", *TWO_NODES, f"run_dir={run_dir}"]
    return start(hosts, "launch", *given, "launch.doctor.enabled=false")


def find_ranks(hosts: Hosts, run_dir: Path) -> list[int]:
    return [pid for name in hosts.names for pid in hosts.pids(name, "train", str(run_dir))]


def test_a_signal_leaves_a_checkpoint_of_the_current_step_and_the_rest_gives_the_same_losses(
    hosts: Hosts, settings: list[str], undisturbed: Losses, tmp_path: Path, kind: str
) -> None:
    """mpirun alone would kill the ranks a second later, DeepSpeed's runner cut their output off."""
    run_dir = tmp_path / "run"
    process = launch(hosts, settings, run_dir, kind)
    wait_for_step(run_dir, 30, process)
    (pid,) = hosts.pids("th1", "launch.cli", f"run_dir={run_dir}")
    os.kill(pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    step = max(read_losses(run_dir))
    assert step < 300
    assert (run_dir / "checkpoints" / f"step-{step:08}" / "manifest.json").is_file()
    assert find_ranks(hosts, run_dir) == []
    code, output = finish(launch(hosts, settings, run_dir, kind))
    assert code == 0, output
    assert f"from step {step}" in output
    assert read_losses(run_dir) == undisturbed


def test_a_stopped_rank_ends_the_start_and_the_next_one_gives_the_same_losses(
    hosts: Hosts, settings: list[str], undisturbed: Losses, tmp_path: Path, kind: str
) -> None:
    """It would keep pdsh and mpirun waiting for ever."""
    run_dir = tmp_path / "run"
    process = launch(hosts, settings, run_dir, kind)
    wait_for_step(run_dir, 30, process)
    (pid,) = hosts.pids("th2", "train", str(run_dir))
    os.kill(pid, signal.SIGSTOP)
    code, output = finish(process)
    assert code == 0, output
    (failed,) = moments(run_dir, "failed")
    assert "missing: rank 1 on th2" in failed.text
    assert read_losses(run_dir) == undisturbed
    assert find_ranks(hosts, run_dir) == []


def test_torchrun_starts_the_ranks_of_a_prepared_folder(
    hosts: Hosts, settings: list[str], undisturbed: Losses, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    given = [*settings, "launch=torchrun", "launch.nodes=2", "parallel.expert=2"]
    given += [f"run_dir={run_dir}", "launch.rendezvous=th1:29400"]
    code, output = finish(start(hosts, "launch", *given))
    assert code == 0, output
    line = next(line for line in output.splitlines() if "torchrun" in line and "--nnodes" in line)
    command = line.split("torchrun ", 1)[1].split()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    nodes = [
        subprocess.Popen(
            hosts.command(name, sys.executable, "-m", "torch.distributed.run", *command),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("th1", "th2")
    ]
    outputs = [node.communicate(timeout=SECONDS)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert read_losses(run_dir) == undisturbed
