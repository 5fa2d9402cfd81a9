"""`thrifty launch launch=slurm` with a real Slurm: submit, train, save, queue again, cancel."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import PATH, Hosts
from tests.cluster.launches import SECONDS, Losses, finish, moments, read_losses, start
from tests.cluster.slurm import DAEMONS, Slurm

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def slurm(hosts: Hosts, folder: Path) -> Iterator[Slurm]:
    missing = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (make cluster-tools)")
    with Slurm(hosts, folder / "slurm") as started:
        yield started


def submit(hosts: Hosts, settings: list[str], run_dir: Path, *more: str) -> str:
    """The number of the job."""
    given = [*settings, "launch=slurm", "launch.nodes=2", "parallel.expert=2", *more]
    code, output = finish(start(hosts, "launch", *given, f"run_dir={run_dir}"))
    assert code == 0, output
    line = next(line for line in output.splitlines() if line.startswith("submitted as job"))
    return line.split()[3].rstrip(";")


def wait_until(claim: Callable[[], bool], run_dir: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not claim():
        logs = [path.read_text()[-2000:] for path in (run_dir / "slurm").glob("*.log")]
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)


def saved_step(run_dir: Path) -> int:
    """The step at which a run was interrupted and from which it went on."""
    saved = moments(run_dir, "interrupted")[-1].text
    assert saved.endswith(": a signal"), saved
    step = int(saved.split()[2].rstrip(":"))
    assert f"from step {step}" in moments(run_dir, "started")[-1].text
    return step


def test_a_job_near_its_limit_saves_queues_again_and_finishes_with_the_same_losses(
    hosts: Hosts, slurm: Slurm, settings: list[str], undisturbed: Losses, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(hosts, settings, run_dir)
    wait_until(lambda: max(read_losses(run_dir), default=0) >= 50, run_dir)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what comes before the time limit
    wait_until(lambda: slurm.state(job) == "COMPLETED", run_dir)
    assert read_losses(run_dir) == undisturbed
    assert len(moments(run_dir, "requeued")) == 1
    assert len(moments(run_dir, "interrupted")) == 1
    assert saved_step(run_dir) >= 50
    assert [moment.hosts for moment in moments(run_dir, "started")] == [["th1", "th2"]] * 2


def test_a_real_time_limit_is_survived_as_often_as_it_comes(
    hosts: Hosts, slurm: Slurm, settings: list[str], undisturbed: Losses, tmp_path: Path
) -> None:
    """Three minutes, and a link so slow that they don't suffice, until the limit has come near."""
    run_dir = tmp_path / "run"
    hosts.slow("th2", "4mbit")
    try:
        job = submit(hosts, settings, run_dir, "launch.time=3", "launch.save_seconds=30")
        wait_until(lambda: len(moments(run_dir, "requeued")) == 1, run_dir)
    finally:
        hosts.hasten("th2")
    assert slurm.state(job) != "TIMEOUT"
    wait_until(lambda: slurm.state(job) == "COMPLETED", run_dir)
    assert read_losses(run_dir) == undisturbed
    assert len(moments(run_dir, "started")) == len(moments(run_dir, "requeued")) + 1
    assert saved_step(run_dir) >= 1


def test_a_preempted_job_saves_makes_room_and_comes_back(
    hosts: Hosts, slurm: Slurm, settings: list[str], undisturbed: Losses, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(hosts, settings, run_dir, "launch.partition=main")
    wait_until(lambda: max(read_losses(run_dir), default=0) >= 50, run_dir)
    urgent = slurm.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive"),
        *(f"--output={tmp_path}/urgent.log", "--wrap=sleep 1"),
    ).strip()
    wait_until(lambda: slurm.state(urgent) == "COMPLETED", run_dir)
    wait_until(lambda: slurm.state(job) == "COMPLETED", run_dir)
    assert read_losses(run_dir) == undisturbed
    assert len(moments(run_dir, "interrupted")) == 1
    assert saved_step(run_dir) >= 50


def test_a_cancelled_job_leaves_a_run_that_can_be_resumed_and_stays_cancelled(
    hosts: Hosts, slurm: Slurm, settings: list[str], undisturbed: Losses, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(hosts, settings, run_dir)
    wait_until(lambda: max(read_losses(run_dir), default=0) >= 50, run_dir)
    slurm.run("scancel", job)
    wait_until(lambda: len(moments(run_dir, "interrupted")) == 1, run_dir)
    wait_until(lambda: slurm.state(job) == "CANCELLED", run_dir)
    assert moments(run_dir, "requeued") == []
    again = submit(hosts, settings, run_dir)
    wait_until(lambda: slurm.state(again) == "COMPLETED", run_dir)
    assert read_losses(run_dir) == undisturbed
    assert saved_step(run_dir) >= 50


def test_a_killed_rank_is_restarted_within_the_job(
    hosts: Hosts, slurm: Slurm, settings: list[str], undisturbed: Losses, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(hosts, settings, run_dir)
    wait_until(lambda: max(read_losses(run_dir), default=0) >= 50, run_dir)
    (pid,) = hosts.pids("th2", "train", str(run_dir))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: slurm.state(job) == "COMPLETED", run_dir)
    assert read_losses(run_dir) == undisturbed
    assert len(moments(run_dir, "failed")) == 1
