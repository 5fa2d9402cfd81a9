"""Any layout trains the same model: losses, weights, moments, counts and bias."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.recompute import Recompute
from tests.train.tiny import moe_with_all_losses, tiny_model
from tests.train.trained import STEPS, Trained, assert_same_training, train_layout
from train.layout.parallel import ZERO_STAGES
from train.precision import Dtype


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One rank, one micro-batch, nothing recomputed."""
    return train_layout(tmp_path_factory.mktemp("reference"), 1)


def chunked_model(*, limit: int) -> ModelConfig:
    """The same model, whose experts' rows travel in chunks of at most `limit`."""
    model = tiny_model()
    assert model.moe is not None
    model.moe.max_tokens_per_chunk = limit
    return model


LAYOUTS = [
    (1, {"recompute": Recompute.full}),
    (1, {"accumulation": 4}),
    (1, {"accumulation": 4, "recompute": Recompute.full}),
    (2, {}),
    (2, {"recompute": Recompute.full}),
    (2, {"accumulation": 4}),
    (2, {"accumulation": 4, "recompute": Recompute.full}),
    (2, {"expert": 2}),
    (2, {"expert": 2, "recompute": Recompute.full}),
    (2, {"expert": 2, "recompute": Recompute.selective, "accumulation": 2}),
    (2, {"expert": 2, "recompute": Recompute.selective, "model": chunked_model(limit=50)}),
    (2, {"recompute": Recompute.selective, "offload_activations": True}),
    (2, {"expert": 2, "accumulation": 4}),
    (2, {"expert": 2, "accumulation": 4, "recompute": Recompute.full}),
    (2, {"expert": 2, "accumulation": 2, "zero_stage": 2}),
    (4, {"expert": 2}),
    (4, {"expert": 4, "accumulation": 2}),
    (4, {"expert": 2, "zero_stage": 2, "recompute": Recompute.full}),
    (2, {"zero_stage": 0, "expert": 2, "accumulation": 2, "recompute": Recompute.full}),
    (2, {"zero_stage": 3, "expert": 2, "accumulation": 2, "recompute": Recompute.full}),
]
MORE_LAYOUTS = (
    [
        (num_ranks, {"zero_stage": stage, "expert": expert, "accumulation": accumulation, **more})
        for num_ranks, expert in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
        for stage in ZERO_STAGES
        for accumulation, more in (
            (1, {}),
            (2, {"recompute": Recompute.full}),
            (8 // num_ranks, {}),
        )
    ]
    + [
        (
            2,
            {
                "zero_stage": stage,
                "expert": expert,
                "recompute": mode,
                "offload_activations": offloads,
                "model": chunked_model(limit=50),
            },
        )
        for stage in (0, 3)
        for expert in (1, 2)
        for mode in Recompute
        for offloads in (False, True)
        if not (stage == 3 and mode is Recompute.selective)  # refused
    ]
    + [
        (4, {"zero_stage": stage, "expert": expert, "sequence": 2, "accumulation": 2})
        for stage in ZERO_STAGES
        for expert in (1, 2, 4)
    ]
)


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    # The larger part of the shorter list, too, is for `make test-all`.
    [
        pytest.param(*layout, marks=[pytest.mark.slow] * (i % 3 != 0))
        for i, layout in enumerate(LAYOUTS)
    ]
    + [pytest.param(*layout, marks=pytest.mark.slow) for layout in MORE_LAYOUTS],
)
def test_every_layout_equals_one_rank(
    tmp_path: Path, reference: Trained, num_ranks: int, layout: dict[str, Any]
) -> None:
    assert_same_training(train_layout(tmp_path, num_ranks, **layout), reference)


def test_v2s_group_losses_are_the_same_in_every_layout_and_change_the_run(
    tmp_path: Path, reference: Trained
) -> None:
    moe = moe_with_all_losses()
    model = tiny_model(moe=moe)
    alone = train_layout(tmp_path / "alone", 1, model=model)
    spread = train_layout(tmp_path / "spread", 2, model=model, expert=2, accumulation=2)
    torch.testing.assert_close(spread.losses, alone.losses, rtol=1e-5, atol=0)
    for name, expected in alone.state.items():
        error = (spread.state[name] - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5, f"{name} differs by {error:.1e}"
    assert (alone.losses[:, 2:4] > 0.5).all()
    assert (reference.losses[:, 2:4] == 0).all()

    moe.device_balance_loss_weight = moe.communication_balance_loss_weight = 0.0
    without = train_layout(tmp_path / "without", 1, model=model)
    router = "weight/layers.1.ffn.router.weight"
    assert not torch.equal(without.state[router], alone.state[router])


def test_load_counts_every_real_choice_of_every_layer_once(reference: Trained) -> None:
    real = 8 * 16 - 6
    mtp = real - 8  # the last place of each sequence, or its last token before padding
    assert reference.loads.sum(-1).tolist() == [[2 * real, 2 * real, 2 * mtp]] * STEPS


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(s, marks=[pytest.mark.slow] if s % 2 else []) for s in ZERO_STAGES]
)
def test_bf16_stays_near_fp32_and_keeps_fp32_masters_and_bias(
    tmp_path: Path, reference: Trained, zero_stage: int
) -> None:
    got = train_layout(
        tmp_path, 2, expert=2, accumulation=2, zero_stage=zero_stage, dtype=Dtype.bf16
    )
    torch.testing.assert_close(got.losses, reference.losses, rtol=2e-2, atol=0)
    assert all(tensor.dtype == torch.float32 for tensor in got.state.values())
    name = "weight/layers.1.ffn.experts.gate"
    rounded = got.state[name].bfloat16().float()
    assert not torch.equal(rounded, got.state[name]), "the masters were rounded"
    assert (got.state[name] - reference.state[name]).abs().max() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"expert": expert, "zero_stage": stage, **more}
        for expert in (1, 2)
        for stage in ZERO_STAGES
        for more in (
            {},
            {"recompute": Recompute.selective},
            {"recompute": Recompute.full},
            {"offload_activations": True},
        )
        if not (stage == 3 and more.get("recompute") is Recompute.selective)  # refused
    ],
)
def test_fp8_stays_near_fp32_and_keeps_fp32_masters(
    tmp_path: Path, reference: Trained, layout: dict[str, Any]
) -> None:
    got = train_layout(tmp_path, 2, accumulation=2, dtype=Dtype.bf16, fp8=True, **layout)
    torch.testing.assert_close(got.losses, reference.losses, rtol=2e-2, atol=0)
    assert not torch.equal(got.losses, reference.losses)
    assert all(tensor.dtype == torch.float32 for tensor in got.state.values())
    name = "weight/layers.1.ffn.experts.gate"
    assert (got.state[name] - reference.state[name]).abs().max() < 1e-2
    assert not torch.equal(got.state[name].bfloat16().float(), got.state[name])


def test_clipping_scales_every_gradient_by_the_norm_over_all_experts(tmp_path: Path) -> None:
    """SGD-like check through AdamW's first moment: m = (1 - beta1) * clipped gradient."""
    one = train_layout(tmp_path, 1)
    spread = train_layout(tmp_path, 2, expert=2)
    name = "exp_avg/layers.1.ffn.experts.down"
    torch.testing.assert_close(spread.state[name], one.state[name], rtol=1e-4, atol=1e-9)
    assert one.norms[0] > 1.0, "the default clip norm of 1 was active"
