"""The same run by launchers that are not ours: DeepSpeed's over pdsh, Open MPI's, torchrun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.launches import SECONDS, Losses, finish, read_losses, start

pytestmark = pytest.mark.cluster

TWO_NODES = ["launch.nodes=2", "parallel.expert=2", "launch.hosts=[th1,th2]"]


@pytest.mark.parametrize(("kind", "tool"), [("pdsh", "pdsh"), ("openmpi", "mpirun")])
def test_a_launcher_of_others_trains_the_same(
    hosts: Hosts,
    settings: list[str],
    undisturbed: Losses,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tool: str,
) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool} (make cluster-tools)")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    run_dir = tmp_path / "run"
    given = [*settings, f"launch={kind}", *TWO_NODES, f"run_dir={run_dir}"]
    code, output = finish(start(hosts, "launch", *given, "launch.doctor.enabled=false"))
    assert code == 0, output
    assert read_losses(run_dir) == undisturbed


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
