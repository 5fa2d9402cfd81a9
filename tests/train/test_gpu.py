"""A run on one CUDA device: trains in BF16, resumes bit for bit (`make gpu-check`)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny import tiny_run
from train.config import CONFIG_FILE, write_config
from train.journal import read_records
from train.precision import Dtype, PrecisionConfig

pytestmark = pytest.mark.gpu


def start(config_dir: Path) -> None:
    subprocess.run([sys.executable, "-m", "train", str(config_dir)], check=True, timeout=300)


@pytest.mark.parametrize("dtype", Dtype)
def test_a_run_stopped_half_way_resumes_bit_for_bit(
    corpus: Path, tmp_path: Path, dtype: Dtype
) -> None:
    losses = []
    for name, stops in (("whole", [6]), ("halves", [4, 6])):
        config = tiny_run(tmp_path / name, precision=PrecisionConfig(dtype=dtype))
        config.data.folder = str(corpus)
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True)
        for steps in stops:
            config.schedule.steps = steps
            write_config(config, run_dir / CONFIG_FILE)
            start(run_dir)
        losses.append([record["loss"] for record in read_records(run_dir, event="step")])
    assert losses[0] == losses[1]
