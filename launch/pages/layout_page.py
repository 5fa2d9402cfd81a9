"""docs/layouts.md: what combines with what, found by probing the rules that refuse at start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.config import StdlibData
from model.config import MLAModelConfig
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.recompute import Recompute
from model.router import RouterConfig
from train.layout.parallel import ZERO_STAGES, Offload, ParallelConfig, PipelineSchedule
from train.layout.rules import RULES, Layout, broken_rules, describe_value
from train.optimizer.config import OptimizerConfig
from train.precision import Dtype, PrecisionConfig
from train.schedule import ConstantSchedule

PAGE = Path("docs/layouts.md")

INTRODUCTION = """\
# What combines with what

<!-- Written by `make docs` from train/layout/rules.py (launch/pages/layout_page.py); do not
edit. -->

A layout that can't be built is refused before anything is started, with a message that names the
settings and the nearest choice that works. This page asks the same rules: each cell holds the
ZeRO stages (`parallel.zero_stage`) under which the two features work together, on the diagonal
those under which the feature works at all. A dash means none; no entry, that both are values of
one setting.
"""


class Feature(NamedTuple):
    """A row and a column of the table: settings that turn something on."""

    name: str
    settings: dict[str, Any]


FEATURES = (
    Feature("expert parallel", {"parallel.expert": 2}),
    Feature("sequence parallel", {"parallel.sequence": 2}),
    Feature("pipeline", {"parallel.pipeline": 2}),
    *(
        Feature(f"pipeline, {kind}", {"parallel.pipeline": 2, "parallel.pipeline_schedule": kind})
        for kind in PipelineSchedule
        if kind is not PipelineSchedule.one_f_one_b
    ),
    Feature(
        "halves in turns",
        {"parallel.overlap_halves": True, "parallel.expert": 2, "parallel.micro_batch_size": 2},
    ),
    Feature("recompute, selective", {"parallel.recompute": Recompute.selective}),
    Feature("recompute, full", {"parallel.recompute": Recompute.full}),
    Feature("activations on the CPU", {"parallel.offload_activations": True}),
    Feature("optimizer on the CPU", {"parallel.offload_optimizer": Offload.cpu}),
    Feature("weights on the CPU", {"parallel.offload_parameters": Offload.cpu}),
    Feature("optimizer on a disk", {"parallel.offload_optimizer": Offload.nvme}),
    Feature("weights on a disk", {"parallel.offload_parameters": Offload.nvme}),
    Feature("BF16", {"precision.dtype": Dtype.bf16}),
    Feature("Muon", {"optimizer.kind": "muon"}),
)


def probe_layout() -> Layout:
    """A layout of eight ranks that is large enough for every feature at once."""
    return Layout(
        parallel=ParallelConfig(micro_batch_size=1, nvme_path="disk"),
        model=MLAModelConfig(
            vocab_size=512,
            dim=64,
            num_layers=8,
            ffn_dim=64,
            attention=MLAConfig(
                num_heads=8,
                q_lora_rank=16,
                kv_lora_rank=16,
                nope_head_dim=8,
                rope_head_dim=4,
                v_head_dim=8,
            ),
            moe=MoEConfig(num_experts=16, top_k=2, expert_dim=16, router=RouterConfig()),
        ),
        data=StdlibData(folder="corpus", seq_len=64),
        optimizer=OptimizerConfig(),
        precision=PrecisionConfig(),
        schedule=ConstantSchedule(steps=1, batch_size=64, peak_lr=1e-3),
        ranks=8,
    )


def working_stages(*features: Feature) -> list[int]:
    """The ZeRO stages under which no rule refuses the features together."""
    settings = {key: value for feature in features for key, value in feature.settings.items()}
    layout = probe_layout().changed(settings)
    return [
        stage
        for stage in ZERO_STAGES
        if not broken_rules(layout.changed({"parallel.zero_stage": stage}))
    ]


def write_page() -> str:
    """The page's text."""
    return "\n".join([INTRODUCTION, *_matrix(), "", "## The rules", "", *_rules(), ""])


def _matrix() -> Iterator[str]:
    yield f"| | {' | '.join(feature.name for feature in FEATURES)} |"
    yield "|---|" + "---|" * len(FEATURES)
    for i, row in enumerate(FEATURES):
        cells = [_cell(row, column) for column in FEATURES[: i + 1]]
        cells += [""] * (len(FEATURES) - i - 1)
        settings = ", ".join(f"`{describe_value(*item)}`" for item in row.settings.items())
        yield f"| {row.name} ({settings}) | {' | '.join(cells)} |"


def _cell(row: Feature, column: Feature) -> str:
    if any(column.settings.get(key, value) != value for key, value in row.settings.items()):
        return ""  # two values of one setting
    return ", ".join(map(str, working_stages(row, column))) or "-"


def _rules() -> Iterator[str]:
    yield "| settings | a layout is refused because |"
    yield "|---|---|"
    for rule in RULES:
        yield f"| {', '.join(map(_setting, rule.settings))} | {rule.why} |"


def _setting(name: str) -> str:
    return f"`{name}`"
