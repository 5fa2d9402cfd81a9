"""What `train/layout/memory.py` says a layout keeps is what real ranks keep, tensor by tensor."""

import gc
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from tests.ranks import run_ranks
from tests.train.tiny import random_batches, tiny_model, tiny_run
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import RunConfig, check_run
from train.engine.engine import Engine, join
from train.engine.sharding import StepResult
from train.layout.memory import largest_state
from train.layout.parallel import Offload, ParallelConfig
from train.optimizer.config import MuonConfig, OptimizerConfig
from train.optimizer.moments import Moments
from train.precision import Dtype, PrecisionConfig
from train.update import count_denominators, update

BF16 = {"dtype": Dtype.bf16}
HOST = {"offload_optimizer": Offload.cpu}
DISK = {"offload_optimizer": Offload.nvme, "nvme_path": tempfile.gettempdir()}


def live_bytes() -> int:
    """Bytes of all tensors that the interpreter knows of, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class CountedEngine(Engine):
    """Counts what is there when a step's gradients are complete."""

    bytes: int

    def step(self, lr: float) -> StepResult:
        self.bytes = live_bytes()
        return super().step(lr)


def wide_model() -> ModelConfig:
    """Wide enough that weights outweigh a batch."""
    return tiny_model(dim=128, ffn_dim=512)


def count_bytes(config: RunConfig, num_ranks: int) -> int:
    """The most that any rank holds at the end of the second step's backward pass."""
    check_run(config, num_ranks=num_ranks)

    def on_rank() -> int:
        before = live_bytes()
        ranks = join(config.parallel, timeout_minutes=5)
        engine = CountedEngine(config, ranks)
        for step in range(2):
            batches = random_batches(
                step, rank=ranks.replica, num_ranks=ranks.num_replicas, micro_batch_size=1
            )
            over = count_denominators(batches, config.model, ranks)
            update(engine, batches, over, config=config.model, lr=1e-4)
        return engine.bytes - before

    return max(run_ranks(num_ranks, on_rank))


@pytest.mark.parametrize(
    ("num_ranks", "layout", "more"),
    [
        (2, {"zero_stage": 1, "expert": 2}, {}),
        *(
            pytest.param(*layout, marks=pytest.mark.slow)
            for layout in (
                (2, {"zero_stage": 3}, BF16),
                (2, {"zero_stage": 0, "expert": 2}, BF16),
                (4, {"zero_stage": 1, "expert": 2}, BF16),
                (2, {"zero_stage": 1}, {"optimizer": MuonConfig()}),
                (4, {"zero_stage": 2, "expert": 2}, BF16),
                (2, {"zero_stage": 2}, {"optimizer": OptimizerConfig(moments=Moments.bf16)}),
                (2, {"zero_stage": 1, "pipeline": 2}, BF16),
                (2, {"zero_stage": 1, **HOST}, BF16),
                (2, {"zero_stage": 2, "expert": 2, **HOST}, BF16),
                (2, {"zero_stage": 2, **HOST}, {}),
                (2, {"zero_stage": 3, **HOST, "offload_parameters": Offload.cpu}, BF16),
                (2, {"zero_stage": 3, "expert": 2, **HOST}, {}),
                (2, {"zero_stage": 3, **DISK, "offload_parameters": Offload.nvme}, BF16),
            )
        ),
    ],
)
def test_a_rank_keeps_what_is_planned(
    tmp_path: Path, num_ranks: int, layout: dict[str, Any], more: dict[str, Any]
) -> None:
    precision = PrecisionConfig(dtype=more.get("dtype", Dtype.fp32))
    config = tiny_run(
        tmp_path,
        model=wide_model(),
        parallel=ParallelConfig(micro_batch_size=1, reduce_bucket_size=1000, **layout),
        precision=precision,
        optimizer=more.get("optimizer", OptimizerConfig()),
        checkpoint=CheckpointConfig(asynchronous=False),
    )
    # Without an accelerator all that is offloaded lies where the rest does, and is counted too.
    state = largest_state(config, num_ranks=num_ranks)
    planned = state.device + state.host + state.disk
    assert count_bytes(config, num_ranks) == pytest.approx(planned, rel=0.05)
