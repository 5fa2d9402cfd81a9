"""A run on one CUDA device: trains in BF16, resumes bit for bit (`make gpu-check`)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.tiny import tiny_run
from train.checkpoint.checkpoints import CheckpointConfig
from train.checkpoint.manifest import Fragment
from train.checkpoint.snapshot import Snapshot
from train.config import CONFIG_FILE, write_config
from train.journal import read_records
from train.layout.parallel import Offload, ParallelConfig
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


def test_a_run_with_its_state_on_a_disk_equals_one_with_it_in_host_memory(
    corpus: Path, tmp_path: Path
) -> None:
    losses = []
    for where in (Offload.cpu, Offload.nvme):
        config = tiny_run(
            tmp_path / where,
            parallel=ParallelConfig(
                micro_batch_size=4,
                zero_stage=3,
                offload_optimizer=where,
                offload_parameters=where,
                nvme_path=str(tmp_path),
            ),
            precision=PrecisionConfig(dtype=Dtype.bf16),
            checkpoint=CheckpointConfig(asynchronous=False),
        )
        config.data.folder = str(corpus)
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True)
        write_config(config, run_dir / CONFIG_FILE)
        start(run_dir)
        losses.append([record["loss"] for record in read_records(run_dir, event="step")])
    assert losses[0] == losses[1]


def test_a_snapshot_is_copied_into_pinned_memory_which_is_given_back() -> None:
    values = [torch.randn(100_003, device="cuda"), torch.arange(5, device="cuda")]
    fragments = [Fragment(f"weight/{i}", (len(v),), 0, v) for i, v in enumerate(values)]
    for _ in range(3):  # the next one may get the same memory again
        snapshot = Snapshot(fragments)
        taken = snapshot.take(fragments)
        assert all(one.data.is_pinned() for one in taken)
        for one, value in zip(taken, values, strict=True):
            assert torch.equal(one.data, value.cpu())
        del snapshot
        assert not taken[0].data.is_pinned()
