"""A layout's step against plain PyTorch's: what verify observes and compares."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.tiny import tiny_run
from tests.train.verification import verify
from train.layout.parallel import ParallelConfig, Recompute


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (1, {"micro_batch_size": 8}),
        (2, {"micro_batch_size": 2, "zero_stage": 1, "recompute": Recompute.full}),
        (4, {"micro_batch_size": 1, "zero_stage": 2, "expert": 2}),
    ],
)
def test_a_layout_takes_the_steps_that_plain_pytorch_takes(
    tmp_path: Path, num_ranks: int, layout: dict[str, Any]
) -> None:
    comparison = verify(tiny_run(tmp_path, parallel=ParallelConfig(**layout)), num_ranks)
    assert not comparison.mismatches
    compared = {difference.key.quantity for difference in comparison.differences}
    assert {"forward", "load", "loss", "gradient", "norm", "weight", "buffer"} < compared


def test_gradients_are_those_before_clipping(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, parallel=ParallelConfig(micro_batch_size=4))
    config.optimizer.clip_norm = 0.01
    comparison = verify(config, 2)
    assert not comparison.mismatches
    parts = [f for key, fs in comparison.got.items() if key[:2] == (1, "gradient") for f in fs]
    norm = torch.stack([part.data.norm() for part in parts]).norm()
    assert norm > 1
