"""Learning rate and batch size over the steps of a run."""

import math
from typing import Any

import pytest

from tests.train.tiny import tiny_model
from train.schedule import (
    BatchRampConfig,
    ChangeConfig,
    ChangesConfig,
    ConstantSchedule,
    CosineSchedule,
    MultiStepSchedule,
    ScheduleConfig,
    WSDSchedule,
    batch_size,
    check_schedule,
    learning_rate,
    model_at,
)


def rates(config: ScheduleConfig) -> list[float]:
    return [learning_rate(config, step) for step in range(config.steps)]


def test_warmup_rises_linearly_and_its_last_step_is_the_peak() -> None:
    config = ConstantSchedule(steps=10, batch_size=1, peak_lr=2.0, warmup_steps=4)
    assert rates(config) == [0.5, 1.0, 1.5, 2.0] + [2.0] * 6


def test_cosine_holds_then_falls_to_its_final_ratio_and_stays() -> None:
    config = CosineSchedule(
        steps=20, batch_size=1, peak_lr=1.0, constant_steps=5, decay_steps=10, final_ratio=0.1
    )
    got = rates(config)
    assert got[:6] == [1.0] * 6
    assert got[10] == pytest.approx(0.55)
    assert got[15:] == pytest.approx([0.1] * 5)
    assert got[7] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.2)) / 2)


def test_cosine_without_decay_steps_reaches_the_end() -> None:
    config = CosineSchedule(steps=100, batch_size=1, peak_lr=1.0, warmup_steps=10)
    assert learning_rate(config, 10) == 1.0
    assert learning_rate(config, 99) == pytest.approx(0.1, rel=1e-2)


def test_wsd_decays_linearly_in_its_last_steps_only() -> None:
    config = WSDSchedule(steps=10, batch_size=1, peak_lr=1.0, decay_steps=4)
    assert rates(config) == pytest.approx([1.0] * 6 + [0.75, 0.5, 0.25, 0.0])


def test_multistep_drops_at_its_milestones() -> None:
    config = MultiStepSchedule(steps=10, batch_size=1, peak_lr=1.0)
    assert rates(config) == [1.0] * 8 + [0.316] + [0.1]


def test_batch_ramp_passes_every_level_and_ends_at_the_batch_size() -> None:
    ramp = BatchRampConfig(start=4, steps=6, increment=4)
    config = ConstantSchedule(steps=9, batch_size=12, peak_lr=1.0, batch_ramp=ramp)
    assert [batch_size(config, step) for step in range(9)] == [4, 4, 8, 8, 12, 12, 12, 12, 12]


def test_a_changed_rate_holds_until_the_next_change_whatever_the_shape() -> None:
    changes = ChangesConfig(learning_rate=ChangeConfig(steps=[6, 8], values=[0.25, 0.125]))
    config = WSDSchedule(steps=10, batch_size=1, peak_lr=1.0, decay_steps=5, changes=changes)
    assert rates(config) == [1.0] * 5 + [0.8] + [0.25] * 2 + [0.125] * 2


def test_the_models_weights_change_at_their_steps() -> None:
    changes = ChangesConfig(
        mtp_loss_weight=ChangeConfig(steps=[2], values=[0.125]),
        bias_update_speed=ChangeConfig(steps=[3], values=[0.0]),
    )
    config = ConstantSchedule(steps=4, batch_size=1, peak_lr=1.0, changes=changes)
    model = tiny_model()
    assert model.moe is not None
    got = [model_at(model, config, step) for step in range(4)]
    assert [at.mtp.loss_weight for at in got] == [0.3, 0.3, 0.125, 0.125]
    assert [at.moe.router.bias_update_speed for at in got] == [0.01, 0.01, 0.01, 0.0]
    assert model == tiny_model(), "the run's own config changed"
    assert model_at(model, ConstantSchedule(steps=4, batch_size=1, peak_lr=1.0), 3) is model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ConstantSchedule(steps=0, batch_size=1, peak_lr=1.0), "schedule.steps=0"),
        (ConstantSchedule(steps=1, batch_size=1, peak_lr=0.0), "schedule.peak_lr=0.0"),
        (
            ConstantSchedule(steps=4, batch_size=1, peak_lr=1.0, warmup_steps=5),
            "schedule.warmup_steps=5 must lie between 0 and schedule.steps=4",
        ),
        (WSDSchedule(steps=4, batch_size=1, peak_lr=1.0, decay_steps=5), "schedule.decay_steps=5"),
        (
            CosineSchedule(steps=4, batch_size=1, peak_lr=1.0, constant_steps=5),
            "exceed schedule.steps=4",
        ),
        (
            ConstantSchedule(
                steps=4,
                batch_size=1,
                peak_lr=1.0,
                changes=ChangesConfig(learning_rate=ChangeConfig(steps=[4], values=[0.5])),
            ),
            r"schedule.changes.learning_rate.steps=\[4\] must rise from 0 to at most 3",
        ),
        (
            ConstantSchedule(
                steps=4,
                batch_size=1,
                peak_lr=1.0,
                changes=ChangesConfig(mtp_loss_weight=ChangeConfig(steps=[1], values=[-0.5])),
            ),
            r"schedule.changes.mtp_loss_weight.values=\[-0.5\] must not be negative",
        ),
        (
            MultiStepSchedule(steps=4, batch_size=1, peak_lr=1.0, milestones=[0.9, 0.8]),
            "must rise",
        ),
        (
            ConstantSchedule(
                steps=4,
                batch_size=8,
                peak_lr=1.0,
                batch_ramp=BatchRampConfig(start=3, steps=2, increment=2),
            ),
            "schedule.batch_ramp.increment=2 does not divide the growth from 3",
        ),
    ],
)
def test_impossible_schedules_are_refused_with_key_and_value(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(config)
