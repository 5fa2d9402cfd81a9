"""The process that every rank runs: exit codes and what it leaves for its launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.tiny import tiny_run
from train.config import CONFIG_FILE, RunConfig, write_config
from train.journal import METRICS_FILE
from train.outcome import ExitCode, Status, read_outcome

SECONDS = 600  # a safety net: what is awaited takes a few when the machine is idle


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> RunConfig:
    config = tiny_run(tmp_path)
    config.data.folder = str(corpus)
    Path(config.run_dir).mkdir()
    return config


def start(config: RunConfig) -> subprocess.Popen[str]:
    write_config(config, Path(config.run_dir) / CONFIG_FILE)
    return subprocess.Popen(
        [sys.executable, "-m", "train", config.run_dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_sigterm_saves_and_exits_with_the_code_that_means_start_me_again(
    config: RunConfig,
) -> None:
    config.schedule.steps = 100_000
    config.checkpoint.every = 100_000
    process = start(config)
    metrics = Path(config.run_dir) / METRICS_FILE
    try:
        deadline = time.monotonic() + SECONDS
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == ExitCode.INTERRUPTED, err
    outcome = read_outcome(Path(config.run_dir))
    assert outcome is not None
    assert outcome.status is Status.interrupted
    saved = Path(config.run_dir) / f"checkpoints/step-{outcome.step:08}"
    assert saved.is_dir()
    assert f"checkpoint {outcome.step}/" in out


def test_a_mistake_ends_with_its_message_and_no_traceback(config: RunConfig) -> None:
    config.data.folder = "/nowhere"
    process = start(config)
    try:
        _, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == ExitCode.FAILED
    assert "data.folder=/nowhere" in err
    assert "Traceback" not in err
    outcome = read_outcome(Path(config.run_dir))
    assert outcome is not None
    assert outcome.status is Status.failed
    assert "data.folder=/nowhere" in outcome.reason
