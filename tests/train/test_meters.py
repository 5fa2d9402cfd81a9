"""What a step's record holds of the model's losses."""

from pathlib import Path

import pytest
import torch

from model.moe import MoEConfig
from model.router import RouterConfig
from tests.train.tiny import tiny_model, tiny_run
from train.meters import Meters
from train.progress import Progress
from train.ranks import alone
from train.update import StepReport

GROUPS = RouterConfig(num_groups=4, top_groups=2)


@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_v2s_further_balance_losses_are_recorded_where_they_have_a_weight(
    weight: float, tmp_path: Path
) -> None:
    moe = MoEConfig(
        num_experts=8, top_k=2, expert_dim=16, device_balance_loss_weight=weight, router=GROUPS
    )
    meters = Meters(tiny_run(tmp_path, model=tiny_model(moe=moe)), alone())
    losses = torch.tensor([4.0, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    report = StepReport(losses, torch.ones(3, 8, dtype=torch.int64), 1.0, True)
    record = meters.read(report, Progress(step=1), lr=1e-3)
    assert (record["loss"], record["balance_loss"], record["mtp_loss_1"]) == (4.0, 1.0, 5.0)
    further = (record.get("device_balance_loss"), record.get("communication_balance_loss"))
    assert further == ((2.0, 3.0) if weight else (None, None))
