"""A pipeline of stages trains the same model as one rank that holds all blocks."""

from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig, MTPConfig
from model.recompute import Recompute
from tests.train.tiny import tiny_model
from tests.train.trained import (
    Trained,
    assert_same_records,
    assert_same_training,
    run_on,
    train_layout,
)
from train.parallel import PipelineSchedule


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
