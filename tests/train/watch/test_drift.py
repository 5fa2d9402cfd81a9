"""Layers whose FP8 products drift fall back by themselves, say so, and stay so after a resume."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.products import Products, product_layers, use_fp8
from tests.model.small import packed_batch, small_config, small_model
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import read_manifest
from train.config import RunConfig, check_run
from train.engine.engine import join
from train.journal import read_records
from train.layout.parallel import ParallelConfig
from train.loop import train
from train.precision import Dtype, PrecisionConfig
from train.progress import Progress
from train.ranks import alone
from train.watch.drift import DriftConfig, DriftMonitor, difference


def test_a_difference_is_relative_and_infinite_where_only_fp8_is_no_number() -> None:
    x = torch.randn(5, 7)
    assert difference(x * 1.25, x).item() == pytest.approx(0.25)
    assert difference(x * 1e30, x * 2e30).item() == pytest.approx(0.5)
    assert difference(torch.zeros(3), torch.zeros(3)).item() == 0
    assert difference(torch.zeros(0, 4), torch.zeros(0, 4)).item() == 0
    for bad in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[2, 3] = bad
        assert difference(spoilt, x).item() == math.inf
        assert difference(spoilt, spoilt).item() == 0, "not FP8's fault"


def test_every_layer_has_its_turn_and_comparing_changes_nothing() -> None:
    model = small_model(small_config(mtp_depth=1))
    use_fp8(model)
    batch = packed_batch([[4]])
    wanted = model(*batch, segments=[4]).loss
    progress, config = Progress(), DriftConfig(every=2, limit=1e9)
    monitor = DriftMonitor(config, model, progress, alone())
    measured = []
    for step in range(2 * len(product_layers(model))):
        progress.step = step
        monitor.watch(progress)
        if step % 2 == 0:
            assert torch.equal(model(*batch, segments=[4]).loss, wanted)
        drifts = monitor.judge(progress)
        assert len(drifts) == (step % 2 == 0)
        measured += [drift.layer for drift in drifts]
    assert sorted(measured) == sorted(product_layers(model))
    assert all(layer.is_fp8 for layer in product_layers(model).values())


class Double(Products):
    """2x; in FP8 something else."""

    def __init__(self, in_fp8: float) -> None:
        super().__init__()
        self.in_fp8 = in_fp8

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.in_fp8 if self.is_fp8 else 2.0)


@pytest.mark.parametrize(("in_fp8", "falls"), [(2.1, False), (2.4, True), (math.nan, True)])
def test_a_layer_too_far_off_or_not_finite_leaves_fp8_and_no_other_does(
    in_fp8: float, falls: bool
) -> None:
    model = nn.Sequential(Double(2.0), Double(in_fp8))
    use_fp8(model)
    progress = Progress()
    monitor = DriftMonitor(DriftConfig(every=1), model, progress, alone())
    for step in range(4):
        progress.step = step
        monitor.watch(progress)
        model(torch.randn(3, 4))
        monitor.judge(progress)
    assert progress.without_fp8 == (["1"] if falls else [])
    assert [layer.is_fp8 for layer in product_layers(model).values()] == [True, not falls]


def test_after_a_step_that_was_not_finite_all_layers_are_compared() -> None:
    model = nn.Sequential(Double(2.0), Double(math.inf), Double(math.nan))
    use_fp8(model)
    progress = Progress(step=7, skipped_in_a_row=1)
    monitor = DriftMonitor(DriftConfig(every=100), model, progress, alone())
    monitor.watch(progress)
    model(torch.randn(3, 4))
    # The third layer's input is no number already: that it isn't either is not its fault.
    assert [drift.layer for drift in monitor.judge(progress)] == ["0", "1", "2"]
    assert progress.without_fp8 == ["1"]


def run(config: RunConfig) -> list[dict[str, Any]]:
    """The run on two ranks until its last step: all its records so far."""
    check_run(config, num_ranks=2)
    Path(config.run_dir).mkdir(exist_ok=True)
    run_ranks(2, lambda: train(config, join(config.parallel, timeout_minutes=5)).step)
    events = ("step", "drift", "fallback")
    kept = ("event", "step", "loss", "grad_norm", "layer", "drift")
    return [
        {key: record[key] for key in kept if key in record}
        for event in events
        for record in read_records(Path(config.run_dir), event=event)
    ]


def drifting(folder: Path, corpus: Path, *, steps: int, **layout: Any) -> RunConfig:
    """A limit that no layer keeps to: one falls back in each step."""
    precision = PrecisionConfig(dtype=Dtype.fp32, fp8=True, drift=DriftConfig(every=1, limit=0.01))
    parallel = ParallelConfig(micro_batch_size=4, **layout)
    config = tiny_run(folder, precision=precision, parallel=parallel)
    config.data.folder, config.schedule.steps = str(corpus), steps
    return config


@pytest.mark.parametrize(
    "layout",
    [
        {"expert": 2},
        pytest.param({"expert": 2, "zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_falls_back_on_all_ranks_and_goes_on_so_after_a_resume(
    tmp_path: Path, corpus: Path, layout: dict[str, Any]
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = run(drifting(tmp_path / "whole", corpus, steps=4, **layout))
    fallen = [record["layer"] for record in whole if record["event"] == "fallback"]
    assert fallen == [record["layer"] for record in whole if record["event"] == "drift"]
    assert len(set(fallen)) == 4, "a layer falls once"

    run(drifting(tmp_path / "stopped", corpus, steps=2, **layout))
    resumed = drifting(tmp_path / "stopped", corpus, steps=4, **layout)
    assert run(resumed) == whole
    newest = Checkpoints(Path(resumed.run_dir)).path(4)
    assert read_manifest(newest).progress["without_fp8"] == fallen
