"""The worked example of docs/parallelism.md: what layouts of one real model keep and send.

`python -m launch.pages.reference` writes the tables into the page, between their markers.
"""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from data.config import StdlibData
from model.recompute import Recompute
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import RunConfig, check_run, model_schema
from train.layout.memory import activations, largest_state
from train.layout.parallel import Offload, ParallelConfig
from train.layout.traffic import largest_traffic
from train.optimizer.config import OptimizerConfig
from train.optimizer.moments import Moments
from train.precision import Dtype, PrecisionConfig
from train.schedule import ConstantSchedule

PAGE = Path("docs/parallelism.md")
MODEL, SEQ_LEN, BATCH_SIZE = "v2_lite", 4096, 512
GIB = 2**30


class Example(NamedTuple):
    settings: dict[str, Any]  # of `parallel`, and `moments`
    num_ranks: int = 8


EIGHT = [
    Example({"zero_stage": 1}),
    Example({"zero_stage": 1, "expert": 8}),
    Example({"zero_stage": 2, "expert": 8}),
    Example({"zero_stage": 2, "expert": 8, "recompute": Recompute.selective}),
    Example({"zero_stage": 2, "expert": 8, "recompute": Recompute.full}),
    Example({"zero_stage": 2, "expert": 8, "moments": Moments.bf16}),
    Example({"zero_stage": 2, "expert": 8, "offload_optimizer": Offload.cpu}),
    Example({"zero_stage": 3, "expert": 8}),
    Example({"zero_stage": 2, "expert": 8, "sequence": 2}),
    Example({"zero_stage": 1, "expert": 4, "pipeline": 2}),
]

BY_SIZE = [
    Example({"zero_stage": 3, "offload_optimizer": Offload.cpu}, 1),
    Example({"zero_stage": 3, "offload_optimizer": Offload.nvme}, 1),
    Example({"zero_stage": 3, "offload_optimizer": Offload.cpu}, 2),
    Example({"zero_stage": 3, "expert": 2, "offload_optimizer": Offload.cpu}, 2),
    Example({"zero_stage": 3, "expert": 4, "offload_optimizer": Offload.cpu}, 4),
    Example({"zero_stage": 2, "expert": 4, "offload_optimizer": Offload.cpu}, 4),
    Example({"zero_stage": 2, "expert": 4}, 4),
    Example({"zero_stage": 2, "expert": 8}, 8),
    Example({"zero_stage": 2, "expert": 8}, 16),
    Example({"zero_stage": 2, "expert": 8}, 64),
    Example({"zero_stage": 3, "expert": 8}, 64),
]


def example_config(example: Example) -> RunConfig:
    """V2-Lite in BF16, one sequence of 4,096 tokens per pass, 512 of them per step."""
    values: Any = OmegaConf.load(str(files("configs") / "model" / f"{MODEL}.yaml"))
    del values["defaults"]
    model: Any = OmegaConf.to_object(OmegaConf.merge(model_schema("mla"), values))
    settings = dict(example.settings)
    optimizer = OptimizerConfig(moments=settings.pop("moments", Moments.fp32))
    return RunConfig(
        run_dir="example",
        model=model,
        data=StdlibData(folder="corpus", seq_len=SEQ_LEN),
        optimizer=optimizer,
        schedule=ConstantSchedule(steps=1, batch_size=BATCH_SIZE, peak_lr=1e-4),
        precision=PrecisionConfig(dtype=Dtype.bf16),
        parallel=ParallelConfig(micro_batch_size=1, nvme_path="disk", **settings),
        checkpoint=CheckpointConfig(asynchronous=False),
    )


def describe(example: Example) -> str:
    names = [f"`{name}={value}`" for name, value in example.settings.items()]
    return ", ".join(names)


def draw_costs(examples: list[Example]) -> str:
    """The table: GiB kept by the fullest rank, and sent by it in a step."""
    lines = [
        "| GPUs | layout | weights | gradients | masters, moments | together | in host memory "
        "| on disk | activations | sent: gradients, weights | sent: tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for example in examples:
        config, num_ranks = example_config(example), example.num_ranks
        check_run(config, num_ranks=num_ranks)
        state = largest_state(config, num_ranks=num_ranks)
        sent = largest_traffic(config, num_ranks=num_ranks)
        numbers = [
            *(state.weights, state.gradients, state.optimizer, state.device),
            *(state.host, state.disk),
            activations(config),
            sent.gradients + sent.weights,
            sent.experts + sent.sequences + sent.stages,
        ]
        cells = " | ".join(f"{number / GIB:,.1f}" for number in numbers)
        lines.append(f"| {num_ranks} | {describe(example)} | {cells} |")
    return "\n".join(lines)


def write_page(page: str) -> str:
    """The page with its tables as the code computes them."""
    for name, examples in (("eight GPUs", EIGHT), ("1 to 64 GPUs", BY_SIZE)):
        begin, end = (
            f"<!-- {name}: {word} (launch/pages/layout_costs.py) -->" for word in ("from", "to")
        )
        between = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
        assert between.search(page), f"the page has lost its marker {begin}"
        table = f"{begin}\n{draw_costs(examples)}\n{end}"
        page = between.sub(lambda _, table=table: table, page)  # type: ignore[misc]
    return page
