"""The layouts that verify passes, over every ZeRO stage, spread of experts, and so on together.

Each takes two steps on a batch with documents and padding, in fp32, and is compared with plain
PyTorch: states, losses, gradients, norm, moments, weights to 1e-5, counts and biases exactly.
"""

from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig, MTPConfig
from model.mla import MLAConfig
from tests.train.tiny import tiny_model, tiny_run
from tests.train.verification import verify
from train.parallel import ZERO_STAGES, ParallelConfig, Recompute

BATCH_SIZE = 8
FULL = {"recompute": Recompute.full}
SELECTIVE = {"recompute": Recompute.selective}

Layout = dict[str, Any]  # fields of ParallelConfig, and `accumulation`

FEW: list[tuple[int, Layout]] = [
    (1, {"zero_stage": 0, "accumulation": 4, **FULL}),
    (1, {"zero_stage": 3, **SELECTIVE}),
    (2, {"zero_stage": 1, "accumulation": 2}),
    (2, {"zero_stage": 0, "expert": 2, "accumulation": 2}),
    (2, {"zero_stage": 2, "expert": 2, "accumulation": 2, **FULL}),
    (2, {"zero_stage": 3, "expert": 2, **FULL}),
    (2, {"zero_stage": 1, "expert": 2, "sequence": 2, "accumulation": 2, **SELECTIVE}),
    (4, {"zero_stage": 1, "expert": 2}),
    (4, {"zero_stage": 2, "expert": 2, "sequence": 2, **FULL}),
    (4, {"zero_stage": 3, "expert": 2, "accumulation": 2}),
]

MANY: list[tuple[int, Layout]] = [
    (
        num_ranks,
        {"zero_stage": stage, "expert": expert, "sequence": sequence, "accumulation": accumulation}
        | more,
    )
    for num_ranks in (1, 2, 4)
    for expert in (1, 2, 4)
    for sequence in (1, 2, 4)
    if num_ranks % expert == 0 and num_ranks % sequence == 0
    for stage in ZERO_STAGES
    for accumulation, more in ((1, SELECTIVE), (2, FULL), (2, {}))
]


def model() -> ModelConfig:
    """Four heads for four ranks, MTP two tokens ahead."""
    attention = MLAConfig(
        num_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        nope_head_dim=8,
        rope_head_dim=4,
        v_head_dim=8,
    )
    return tiny_model(attention=attention, mtp=MTPConfig(depth=2))


def check(folder: Path, num_ranks: int, layout: Layout) -> None:
    layout = dict(layout)
    replicas = num_ranks // layout.get("sequence", 1)
    micro_batch_size = BATCH_SIZE // replicas // layout.pop("accumulation", 1)
    parallel = ParallelConfig(micro_batch_size=micro_batch_size, **layout)
    config = tiny_run(folder, model=model(), parallel=parallel)
    config.optimizer.clip_norm = 0.1
    comparison = verify(config, num_ranks)
    wrong = [f"{d.key} differs by {d.error:.1e} {d.problem}" for d in comparison.mismatches]
    assert not wrong, "\n".join(wrong[:5])


@pytest.mark.parametrize(("num_ranks", "layout"), FEW, ids=str)
def test_a_layout_trains_the_same_model(tmp_path: Path, num_ranks: int, layout: Layout) -> None:
    check(tmp_path, num_ranks, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "layout"), MANY, ids=str)
def test_every_combination_of_layouts_trains_the_same_model(
    tmp_path: Path, num_ranks: int, layout: Layout
) -> None:
    check(tmp_path, num_ranks, layout)
