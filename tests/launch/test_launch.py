"""`thrifty launch` on this machine: kept alive, told, and shown beforehand."""

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from launch import cli
from launch.fitness.network import rounds
from launch.nodes.order import passed_environment
from launch.nodes.rank import name_rank
from launch.settings.config import PdshLaunch
from launch.start.job_commands import pdsh_files
from launch.start.slurm import write_script
from launch.start.starters import Attempt, Ready, build_starter, job_environment
from launch.status import describe
from launch.survive.supervision import SupervisionConfig, backoff
from launch.survive.timeline import read_timeline
from tests.command import compose, start, thrifty
from tests.launch.test_train import SECONDS, find_ranks, num_steps, wait_until

SLURM = ["launch=slurm", "launch.nodes=2", "launch.processes=4", "parallel.expert=2"]


@pytest.mark.slow
def test_a_killed_run_is_started_again_and_ends_as_if_nothing_had_happened(
    smoke: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = ["schedule.steps=90", "checkpoint.every=10", "evaluation.every=90"]
    process = start(
        *("launch", *smoke, *settings, f"run_dir={run_dir}"),
        *("launch.doctor.enabled=false", "launch.supervision.backoff_seconds=0.1"),
        cwd=tmp_path,
    )
    wait_until(lambda: num_steps(run_dir) >= 15 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    find_ranks(run_dir)[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    events = [moment.event for moment in read_timeline(run_dir)]
    starts = ["started", "training", "failed", "restarting", "started", "training", "finished"]
    assert events == starts
    assert "was killed by SIGKILL" in output
    status = describe(run_dir)
    assert "state       finished" in status
    assert "start 2" in status

    undisturbed = tmp_path / "undisturbed"
    code, output = thrifty("train", *smoke, *settings, f"run_dir={undisturbed}", cwd=tmp_path)
    assert code == 0, output
    assert losses(run_dir) == losses(undisturbed)


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["loss"] for record in records if record["event"] == "step"]


@pytest.mark.slow
def test_a_mistake_that_would_recur_is_not_tried_again(smoke: list[str], tmp_path: Path) -> None:
    code, output = thrifty(
        *("launch", *smoke, f"run_dir={tmp_path / 'run'}", "launch.doctor.enabled=false"),
        "model.vocab_size=300",
        cwd=tmp_path,
    )
    assert code == 1, output
    assert "model.vocab_size=300 is smaller" in output
    assert output.count("  started ") == 1


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`thrifty ARGUMENTS` in this process."""
    monkeypatch.setattr("sys.argv", ["thrifty", *arguments])
    return cli.main()


def test_train_refuses_nodes_that_it_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "train", "experiment=smoke", "launch=ssh", "launch.hosts=[a]") == 2
    assert "use thrifty launch" in capsys.readouterr().err


def test_a_dry_run_shows_commands_without_secrets_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    code, output = thrifty(
        *("launch", "experiment=smoke", "launch=ssh", "launch.hosts=[node1,node2,node3]"),
        *("launch.nodes=2", f"run_dir={tmp_path / 'run'}", "--dry-run"),
        cwd=tmp_path,
    )
    assert code == 0, output
    modules = {"fitness.probe": 1, "fitness.network": 1, "nodes.hello": 1, "nodes.agent": 2}
    for module, count in modules.items():
        assert output.count(f"-m launch.{module}") == count
    assert "spares: node3" in output
    assert "verysecret" not in output
    assert '"NCCL_DEBUG": "WARN"' in output
    assert not (tmp_path / "run").exists()


def test_no_secret_stands_on_a_command_line_or_in_a_file_of_another_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    given = ["experiment=smoke", "launch.hosts=[node1,node2]", "launch.nodes=2", "run_dir=/x"]
    given += ["launch.interface=eth1", "launch.threads_per_process=3"]
    nodes = [Ready(name, "10.0.0.1", 29500) for name in ("node1", "node2")]
    for kind in ("pdsh", "openmpi", "ssh"):
        launch = compose(*given, f"launch={kind}").launch
        attempt = Attempt(Path("/x"), "id", 1, nodes, launch)
        words = [word for command in build_starter(launch).commands(attempt) for word in command]
        assert [word for word in words if "verysecret" in word] == []
        if kind == "openmpi":
            names = [words[place + 1] for place, word in enumerate(words) if word == "-x"]
            assert {"WANDB_API_KEY", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"} <= set(names)
        if isinstance(launch, PdshLaunch):
            names = ["node1", "node2"]
            files = pdsh_files(launch, Path("/x"), names, job_environment(attempt))
            text = "".join(files.values())
            assert "verysecret" not in text
            assert "GLOO_SOCKET_IFNAME=eth1\n" in text
            assert "OMP_NUM_THREADS=3\n" in text


def test_launch_help_lists_every_way_and_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "launch", "--help") == 0
    output = capsys.readouterr().out
    for word in ("launch=ssh", "launch=slurm", "launch.supervision.max_restarts", "--dry-run"):
        assert word in output


def test_the_batch_script_is_shell_and_holds_what_was_asked_for(tmp_path: Path) -> None:
    run_dir = tmp_path / "a run; $(touch x)"
    config = compose(
        *("experiment=smoke", *SLURM, "launch.time=1-00:00:00", "launch.options=['--mem=0']"),
        *("schedule.batch_size=16", f"run_dir='{run_dir}'", "launch.supervision.min_nodes=1"),
    )
    script = write_script(config)
    for line in ("--nodes=1-2", "--ntasks-per-node=4", "--time=1-00:00:00", "--mem=0"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --signal=B:USR1@120\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    command = shlex.split(script.splitlines()[-1])
    assert command[0] == "exec"
    assert command[-1] == str(run_dir)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("launch.partition='a b'", "launch.partition='a b' must be one word"),
        ("launch.options=['mem=0']", "'mem=0' is no option of sbatch"),
        ("launch.save_seconds=0", "launch.save_seconds=0 must be at least 1"),
    ],
)
def test_what_slurm_would_misread_is_refused(
    setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compose("experiment=smoke", *SLURM, "schedule.batch_size=16", setting)
    assert message in capsys.readouterr().err


def test_a_job_of_slurm_waits_no_longer_for_a_save_than_its_time_limit() -> None:
    given = ["experiment=smoke", *SLURM, "schedule.batch_size=16"]
    assert compose(*given, "launch.save_seconds=60").launch.grace_seconds == 60
    assert compose(*given, "launch.save_seconds=900").launch.grace_seconds == 300
    assert compose("experiment=smoke").launch.grace_seconds == 300


def test_waits_double_up_to_their_limit() -> None:
    rules = SupervisionConfig(backoff_seconds=5, max_backoff_seconds=30)
    assert [backoff(rules, failures) for failures in range(1, 6)] == [5, 10, 20, 30, 30]


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8])
def test_every_pair_of_nodes_is_measured_once_and_none_twice_at_a_time(nodes: int) -> None:
    seen = []
    for pairs in rounds(nodes):
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
        seen += pairs
    assert sorted(seen) == [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]


def test_ranks_know_their_number_from_whoever_started_them() -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    assert name_rank(slurm) == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    mpi = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}
    assert name_rank({**slurm, **mpi}) == {"RANK": "2", "WORLD_SIZE": "4"}
    assert name_rank({**slurm, "RANK": "0"}) == {}
    assert name_rank({"PATH": "/bin"}) == {}


def test_only_what_concerns_ranks_travels_to_other_nodes() -> None:
    given = {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "k", "SSH_AUTH_SOCK": "/x", "AWS_SECRET": "y"}
    assert passed_environment(given) == {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "k"}
    assert os.environ.get("PATH")
