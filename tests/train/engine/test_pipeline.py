"""A pipeline of stages trains the same model as one rank that holds all blocks."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import train.update
from model.config import ModelConfig, MTPConfig
from model.recompute import Recompute
from tests.train.tiny import tiny_model, tiny_run
from tests.train.trained import (
    Trained,
    assert_same_records,
    assert_same_training,
    run_on,
    train_layout,
)
from train.config import check_run
from train.engine.stages import balance
from train.layout.parallel import ParallelConfig, PipelineSchedule
from train.precision import Dtype


def five_layers() -> ModelConfig:
    """One dense layer, four with experts, MTP two tokens ahead."""
    return tiny_model(num_layers=5, mtp=MTPConfig(depth=2))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_layout(tmp_path_factory.mktemp("reference"), 1, model=five_layers())


ONE_F_ONE_B = PipelineSchedule.one_f_one_b
LAYOUTS = [
    *(
        pytest.param(2, {"pipeline": 2, "pipeline_schedule": kind, "accumulation": 4}, id=kind)
        for kind in PipelineSchedule
    ),
    pytest.param(
        4,
        {"pipeline": 2, "expert": 2, "accumulation": 4, "pipeline_layers": [1, 4]},
        id="a stage without experts",
    ),
    pytest.param(2, {"pipeline": 2}, id="fewer micro-batches than stages"),
    *(
        pytest.param(
            4,
            {"pipeline": pipeline, "pipeline_schedule": kind, "recompute": recompute, **more},
            marks=pytest.mark.slow,
        )
        for kind in PipelineSchedule
        for pipeline, more in (
            (2, {"expert": 2, "accumulation": 4}),
            (2, {"expert": 1, "accumulation": 4}),
            (4, {"expert": 1, "accumulation": 8}),
            (2, {"expert": 2, "accumulation": 4, "offload_activations": True}),
        )
        for recompute in Recompute
        if pipeline * kind.parts_per_rank <= 5
    ),
]


@pytest.mark.parametrize(("num_ranks", "layout"), LAYOUTS)
def test_stages_train_the_same_model_as_one_rank(
    tmp_path: Path, reference: Trained, num_ranks: int, layout: dict[str, Any]
) -> None:
    got = train_layout(tmp_path, num_ranks, model=five_layers(), **layout)
    assert_same_training(got, reference)


@pytest.mark.slow
def test_a_run_continues_from_one_rank_to_stages_to_parts_of_sequences(
    corpus: Path, tmp_path: Path
) -> None:
    model = tiny_model(num_layers=4)
    expected = run_on(tmp_path / "one", corpus, 1, model=model, steps=6)
    run_on(tmp_path / "many", corpus, 1, model=model, steps=2)
    run_on(tmp_path / "many", corpus, 2, model=model, steps=4, pipeline=2)
    got = run_on(tmp_path / "many", corpus, 2, model=model, steps=6, sequence=2)
    assert got["evaluation 4"]["targets"] == got["evaluation 6"]["targets"]
    assert_same_records(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [ONE_F_ONE_B, PipelineSchedule.zbv])
def test_bf16_stages_accumulate_in_fp32_as_one_rank_does(
    tmp_path: Path, schedule: PipelineSchedule
) -> None:
    """Far nearer to one BF16 rank than BF16 is to fp32: an accumulation in BF16 would not be."""
    settings: dict[str, Any] = {"model": five_layers(), "accumulation": 4, "dtype": Dtype.bf16}
    one = train_layout(tmp_path / "one", 1, **settings)
    stages = {"pipeline": 2, "pipeline_schedule": schedule}
    got = train_layout(tmp_path / "stages", 2, **settings, **stages)
    torch.testing.assert_close(got.losses, one.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.norms, one.norms, rtol=1e-4, atol=0)
    assert torch.equal(got.loads, one.loads)
    assert all(tensor.dtype == torch.float32 for tensor in got.state.values())
    for name in (name for name in one.state if name.startswith("weight/")):
        assert (got.state[name] - one.state[name]).abs().max() < 5e-5, name


@pytest.mark.parametrize("dtype", Dtype)
def test_gradients_that_are_not_finite_on_one_stage_skip_the_step_on_all(
    corpus: Path, tmp_path: Path, dtype: Dtype
) -> None:
    real, calls = train.update.objective, 0

    def poisoned(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        is_third_step = calls in (5, 6)  # two micro-batches a step
        is_poison = is_third_step and os.environ["RANK"] == "0"
        return real(*args) * (float("nan") if is_poison else 1.0)

    with mock.patch.object(train.update, "objective", poisoned):
        got = run_on(
            tmp_path, corpus, 2, model=tiny_model(num_layers=4), steps=6, pipeline=2, dtype=dtype
        )
    assert [got[f"step {step}"]["skipped"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert got["step 3"]["grad_norm"] is None
    assert got["step 6"]["loss"] < got["step 1"]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 2}, r"zero_stage=2 and parallel.pipeline=2 .*choose parallel.zero_stage=1"),
        ({"overlap_comm": True}, r"choose parallel.overlap_comm=false"),
        ({"sequence": 2}, r"sequence=2 and parallel.pipeline=2 .*choose parallel.sequence=1"),
        ({"expert": 4}, r"expert=4 does not divide the 2 ranks of a stage .*choose .*expert=2"),
        (
            {"pipeline": 4, "pipeline_schedule": PipelineSchedule.zbv},
            r"parallel.pipeline=4 .*num_layers=5 don't go together.*choose parallel.pipeline=2",
        ),
        ({"pipeline_layers": [1, 3]}, r"must be 2 numbers .* add up to model.num_layers=5"),
        ({"pipeline_layers": [5, 0]}, r"leaves a stage without a block"),
        (
            {"pipeline_schedule": PipelineSchedule.dualpipev},
            r"can't put 1 micro-batches .*choose parallel.pipeline_schedule=one_f_one_b",
        ),
    ],
)
def test_stages_that_cannot_work_are_refused_with_the_nearest_that_can(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values: dict[str, Any] = {"pipeline": 2, "micro_batch_size": 4} | changes
    config = tiny_run(tmp_path, model=five_layers(), parallel=ParallelConfig(**values))
    with pytest.raises(ValueError, match=message):
        check_run(config, num_ranks=4)


def test_stages_are_balanced_by_their_largest_cost() -> None:
    assert balance([1, 1, 1, 1, 4], 2) == [4, 1]
    assert balance([5, 1, 1, 1, 1, 5], 3) == [1, 4, 1]
    assert balance([9, 1, 1], 3) == [1, 1, 1]
