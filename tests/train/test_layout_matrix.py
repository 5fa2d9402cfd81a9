"""The layouts that verify passes, over every ZeRO stage, spread of experts, and so on together.

Each takes two steps on a batch with documents and padding, in fp32, and is compared with plain
PyTorch: states, losses, gradients, norm, moments, weights to 1e-5, counts and biases exactly.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.pages.layout_page import FEATURES, working_stages
from model.config import ModelConfig, MTPConfig
from model.recompute import Recompute
from tests.train.tiny import tiny_attention, tiny_model, tiny_moe, tiny_run
from tests.train.verification import verify
from train.checkpoint.checkpoints import CheckpointConfig
from train.layout.parallel import ZERO_STAGES, Offload, ParallelConfig, PipelineSchedule
from train.optimizer.config import MuonConfig, OptimizerConfig
from train.optimizer.moments import Moments
from train.precision import Dtype, PrecisionConfig
from train.schedule import ConstantSchedule

BATCH_SIZE = 8
FULL = {"recompute": Recompute.full}
SELECTIVE = {"recompute": Recompute.selective}
OFFLOAD = {"offload_optimizer": Offload.cpu}
DISK = {
    "offload_optimizer": Offload.nvme,
    "offload_parameters": Offload.nvme,
    "nvme_path": tempfile.gettempdir(),
}
CHUNKS = {"chunk": 10}  # rows; about a third of what a rank receives
HALVES = {"expert": 2, "overlap_halves": True}
BF16_MOMENTS = {"optimizer": OptimizerConfig(moments=Moments.bf16)}
MUON = {"optimizer": MuonConfig(iterate_in=Dtype.fp32)}

# Fields of ParallelConfig, `batch_size` (8), `accumulation` (1), `chunk` (none), `optimizer`
# (AdamW), `is_tied` (no).
Layout = dict[str, Any]

FEW: list[tuple[int, Layout]] = [
    (1, {"zero_stage": 0, "accumulation": 4, **FULL}),
    (2, {"zero_stage": 0, "expert": 2, "accumulation": 2, **MUON}),
    (2, {"zero_stage": 2, "expert": 2, "accumulation": 2, **OFFLOAD, **FULL}),
    (2, {"zero_stage": 3, "expert": 2, **FULL}),
    (2, {"zero_stage": 1, "expert": 2, "sequence": 2, "accumulation": 2, **SELECTIVE}),
    (2, {"pipeline": 2, "pipeline_schedule": PipelineSchedule.dualpipev, "accumulation": 4}),
    (4, {"zero_stage": 1, **HALVES, **BF16_MOMENTS}),
    (4, {"pipeline": 2, "expert": 2, "accumulation": 4, **SELECTIVE, **CHUNKS}),
]

MANY: list[tuple[int, Layout]] = [
    *(
        (num_ranks, {"zero_stage": stage, "expert": expert, "sequence": sequence, **more})
        for num_ranks in (1, 2, 4)
        for expert in (1, 2, 4)
        for sequence in (1, 2, 4)
        if num_ranks % expert == 0 and num_ranks % sequence == 0
        for stage in ZERO_STAGES
        for more in ({**SELECTIVE, **CHUNKS}, {"accumulation": 2, **FULL}, {"accumulation": 2})
        if not (stage == 3 and more.get("recompute") is Recompute.selective)  # refused
    ),
    *(
        (2, {"zero_stage": stage, "expert": expert, "accumulation": 2, **more})
        for stage in ZERO_STAGES
        for expert in (1, 2)
        for more in (
            OFFLOAD,
            OFFLOAD | {"offload_parameters": Offload.cpu},
            DISK,
            {"offload_activations": True, **SELECTIVE},
            BF16_MOMENTS,
            MUON,
        )
        if not (stage == 0 and more.get("offload_optimizer"))
        and not (stage < 3 and more.get("offload_parameters"))
        and not (stage == 3 and (more is MUON or more.get("recompute") is Recompute.selective))
    ),
    *(  # chunks of replicated experts are refused
        (num_ranks, {"zero_stage": 3, "expert": expert, "accumulation": 2, **FULL, **CHUNKS})
        for num_ranks, expert in ((1, 1), (2, 1), (2, 2), (4, 4))
    ),
    *(
        (
            4,
            {"pipeline": 2, "expert": expert, "pipeline_schedule": schedule, "accumulation": 4}
            | more,
        )
        for expert in (1, 2)
        for schedule in PipelineSchedule
        for more in ({}, FULL, MUON)
    ),
    *(
        (num_ranks, {"zero_stage": stage, "batch_size": 16, **HALVES, **more})
        for num_ranks in (2, 4)
        for stage in ZERO_STAGES
        for more in ({"accumulation": 2, **FULL}, {"sequence": 2, "offload_activations": True})
    ),
    (1, {"zero_stage": 3, **FULL}),
    (2, {"zero_stage": 1, **HALVES}),
    *(
        (4, {"zero_stage": 0, "accumulation": 2, "overlap_comm": True, "batch_size": 16, **more})
        for more in (FULL, HALVES | SELECTIVE | CHUNKS)
    ),
    (4, {"zero_stage": 1, "expert": 2, **BF16_MOMENTS}),
    *((2, {"zero_stage": stage, **HALVES, **SELECTIVE, **CHUNKS}) for stage in (0, 1, 2)),
    (2, {"zero_stage": 3, **HALVES, **FULL, **CHUNKS}),
    (2, {"zero_stage": 3, **HALVES, **DISK}),
    (2, {"zero_stage": 1, "accumulation": 2, **CHUNKS}),
    (4, {"zero_stage": 2, "expert": 2, "sequence": 2, **FULL}),
    (2, {"zero_stage": 3, "accumulation": 2, "offload_activations": True, **OFFLOAD}),
    (4, {"pipeline": 4, "accumulation": 8}),
    (4, {"zero_stage": 3, "expert": 2, "accumulation": 2, "offload_activations": True, **OFFLOAD}),
]


def describe(value: Any) -> str:
    """A layout as a test's name."""
    if not isinstance(value, dict):
        return f"{value} ranks"
    plain = {k: v for k, v in value.items() if k != "optimizer"}
    names = [f"{name}={setting}" for name, setting in plain.items()]
    if "optimizer" in value:
        names.append(f"{value['optimizer'].kind}, {value['optimizer'].moments} moments")
    return ", ".join(names) or "plain"


TIED: list[Any] = [
    (2, {"pipeline": 2, "accumulation": 2, "is_tied": True}),
    *(
        pytest.param(num_ranks, {**layout, "is_tied": True}, marks=pytest.mark.slow)
        for num_ranks, layout in (
            (4, {"pipeline": 2, "expert": 2, "accumulation": 4, **FULL}),
            (2, {"pipeline": 2, "pipeline_schedule": PipelineSchedule.zbv, "accumulation": 4}),
            (4, {"pipeline": 4, "accumulation": 8, **MUON}),
            (2, {"zero_stage": 3, "expert": 2, **FULL}),
            (2, {"zero_stage": 2, "sequence": 2, "accumulation": 2}),
        )
    ),
]


def pairs_of_the_page() -> Iterator[Any]:
    """Each cell of docs/layouts.md that isn't a dash, under the highest stage that it names."""
    seen = []
    for i, row in enumerate(FEATURES):
        for column in FEATURES[: i + 1]:
            settings = {**column.settings, **row.settings}
            is_contradiction = any(settings[k] != value for k, value in column.settings.items())
            if is_contradiction or settings in seen:
                continue
            seen.append(settings)
            if stages := working_stages(row, column):
                name = f"{row.name} and {column.name}"
                yield pytest.param(settings | {"parallel.zero_stage": stages[-1]}, id=name)


def model(chunk: int | None, *, is_tied: bool) -> ModelConfig:
    """Four heads for four ranks, blocks for four stages, MTP two tokens ahead."""
    return tiny_model(
        num_layers=4,
        attention=tiny_attention(num_heads=4),
        moe=tiny_moe(max_tokens_per_chunk=chunk),
        mtp=MTPConfig(depth=2),
        tie_embedding=is_tied,
    )


def check_pair(folder: Path, settings: dict[str, Any]) -> None:
    layout = {
        name.removeprefix("parallel."): value
        for name, value in settings.items()
        if name.startswith("parallel.")
    }
    pipeline = layout.get("pipeline", 1)
    size = BATCH_SIZE * layout.pop("micro_batch_size", 1)
    layout |= {
        "batch_size": size,
        "accumulation": 4 if pipeline > 1 else 2,
        "nvme_path": tempfile.gettempdir(),
    }
    num_ranks = pipeline * max(layout.get("expert", 1), layout.get("sequence", 1))
    dtype = settings.get("precision.dtype", Dtype.fp32)
    if settings.get("optimizer.kind") == "muon":
        layout |= MUON
    steps = 2 if dtype is Dtype.fp32 else 1
    check(folder, max(num_ranks, 2), layout, dtype=dtype, steps=steps)


IN_BF16: list[Any] = [
    (2, {"expert": 2, "zero_stage": 2, "accumulation": 2}),
    *(
        pytest.param(num_ranks, layout, marks=pytest.mark.slow)
        for num_ranks, layout in (
            (2, {"pipeline": 2, "accumulation": 4}),
            (1, {"accumulation": 8}),
            (2, {"zero_stage": 0, "accumulation": 2}),
            (2, {"zero_stage": 1, "sequence": 2, **SELECTIVE}),
            (2, {"zero_stage": 1, **CHUNKS}),
            (4, {"zero_stage": 3, "expert": 2, **FULL}),
            (4, {"zero_stage": 3, "batch_size": 16, **HALVES, **FULL}),
            (4, {"zero_stage": 2, "expert": 4, **MUON}),
            (4, {"zero_stage": 1, "expert": 2, **BF16_MOMENTS}),
            (4, {"pipeline": 2, "expert": 2, "accumulation": 4}),
        )
    ),
]


def check(
    folder: Path, num_ranks: int, layout: Layout, *, dtype: Dtype = Dtype.fp32, steps: int = 2
) -> None:
    layout = {"accumulation": 1, "chunk": None, "optimizer": OptimizerConfig(), **layout}
    batch_size = layout.pop("batch_size", BATCH_SIZE)
    accumulation, chunk = layout.pop("accumulation"), layout.pop("chunk")
    is_tied = layout.pop("is_tied", False)
    optimizer = replace(layout.pop("optimizer"), clip_norm=0.1)
    replicas = num_ranks // (layout.get("sequence", 1) * layout.get("pipeline", 1))
    # So small a model would be whole on every rank, and ZeRO 3 not tried, if it kept any tensor so.
    size = batch_size // replicas // accumulation
    parallel = ParallelConfig(micro_batch_size=size, keep_whole=0, **layout)
    config = tiny_run(
        folder,
        model=model(chunk, is_tied=is_tied),
        parallel=parallel,
        schedule=ConstantSchedule(steps=6, batch_size=batch_size, peak_lr=1e-2),
        optimizer=optimizer,
        precision=PrecisionConfig(dtype=dtype),
        checkpoint=CheckpointConfig(asynchronous=False),
    )
    comparison = verify(config, num_ranks, steps=steps)
    wrong = [f"{d.key} differs by {d.error:.1e} {d.problem}" for d in comparison.mismatches]
    assert not wrong, "\n".join(wrong[:5])


@pytest.mark.parametrize(("num_ranks", "layout"), FEW, ids=describe)
def test_a_layout_trains_the_same_model(tmp_path: Path, num_ranks: int, layout: Layout) -> None:
    check(tmp_path, num_ranks, layout)


@pytest.mark.parametrize(("num_ranks", "layout"), TIED, ids=describe)
def test_a_head_that_is_the_embedding_is_trained_alike(
    tmp_path: Path, num_ranks: int, layout: Layout
) -> None:
    check(tmp_path, num_ranks, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "layout"), MANY, ids=describe)
def test_every_combination_of_layouts_trains_the_same_model(
    tmp_path: Path, num_ranks: int, layout: Layout
) -> None:
    check(tmp_path, num_ranks, layout)


@pytest.mark.slow
@pytest.mark.parametrize("settings", pairs_of_the_page())
def test_whatever_the_page_says_works_together_trains_the_same_model(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    check_pair(tmp_path, settings)


@pytest.mark.parametrize(("num_ranks", "layout"), IN_BF16, ids=describe)
def test_in_bf16_a_layout_differs_by_little_more_than_the_order_of_sums(
    tmp_path: Path, num_ranks: int, layout: Layout
) -> None:
    check(tmp_path, num_ranks, layout, dtype=Dtype.bf16, steps=1)
