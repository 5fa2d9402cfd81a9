"""What waits on the host instead of the accelerator changes no number of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.trained import assert_same_training, train_layout
from train.layout.parallel import Offload
from train.precision import Dtype

OPTIMIZER = {"offload_optimizer": Offload.cpu}
PARAMETERS = {"offload_parameters": Offload.cpu}
OFFLOADS = [(1, OPTIMIZER), (3, OPTIMIZER | PARAMETERS)]
MORE_OFFLOADS = [(2, OPTIMIZER), (3, OPTIMIZER), (3, PARAMETERS)]


def cases() -> list[Any]:
    slow = pytest.mark.slow
    return [
        pytest.param(*OFFLOADS[0], Dtype.fp32, 2),
        pytest.param(*OFFLOADS[1], Dtype.fp32, 2, marks=slow),
        *(pytest.param(*offload, Dtype.fp32, 2, marks=slow) for offload in MORE_OFFLOADS),
        *(pytest.param(*offload, Dtype.fp32, 1, marks=slow) for offload in MORE_OFFLOADS),
        *(pytest.param(*o, Dtype.bf16, 2, marks=slow) for o in OFFLOADS + MORE_OFFLOADS),
    ]


@pytest.mark.parametrize(("zero_stage", "offload", "dtype", "expert"), cases())
def test_offload_changes_nothing(
    tmp_path: Path, zero_stage: int, offload: dict[str, Offload], dtype: Dtype, expert: int
) -> None:
    layout = {"zero_stage": zero_stage, "expert": expert, "accumulation": 2, "dtype": dtype}
    there = train_layout(tmp_path / "there", 2, **layout)
    here = train_layout(tmp_path / "here", 2, **layout, **offload)
    if dtype is Dtype.fp32:
        assert_same_training(here, there)
    else:
        torch.testing.assert_close(here.losses, there.losses, rtol=1e-3, atol=1e-3)
        assert all(tensor.dtype == torch.float32 for tensor in here.state.values())
