"""Every optimizer trains, saves and resumes bit for bit under ZeRO with experts spread."""

import re
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (once, before ranks fork)
import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.train.tiny import random_batches, tiny_run
from train.checkpoint.checkpoints import CheckpointConfig, Checkpoints, load
from train.checkpoint.coverage import check_coverage
from train.config import RunConfig, check_run
from train.engine.engine import Engine, join
from train.layout.parallel import Offload, ParallelConfig
from train.loop import train
from train.optimizer.config import MuonConfig, OptimizerConfig
from train.optimizer.moments import Moments
from train.precision import Dtype
from train.ranks import Ranks
from train.run import Run
from train.update import count_denominators, update

ABOUT: dict[str, Any] = {
    "progress": {},
    "tokenizer": "",
    "layout": {},
    "versions": {},
    "config": {},
}
CHOICES = {
    "adamw": OptimizerConfig(),
    "adamw_bf16": OptimizerConfig(moments=Moments.bf16),
    "adamw_8bit": OptimizerConfig(moments=Moments.int8),
    "muon": MuonConfig(),
}

# Half the spacing of the stored numbers at their largest, relative to that (8 bits: and a little).
COARSEST = {Moments.fp32: 0.0, Moments.bf16: 2**-8, Moments.int8: 0.0071}


def train_steps(engine: Engine, ranks: Ranks, config: RunConfig, steps: range) -> list[float]:
    losses = []
    for step in steps:
        batches = random_batches(
            step, rank=ranks.replica, num_ranks=ranks.num_replicas, micro_batch_size=2
        )
        over = count_denominators(batches, config.model, ranks)
        report = update(engine, batches, over, config=config.model, lr=1e-3)
        assert report.is_applied
        losses.append(float(report.losses[0]))
    return losses


def start(config: RunConfig, *, step: int | None = None) -> tuple[Engine, Ranks]:
    """A new engine, filled from the checkpoint of a step if one is named."""
    ranks = join(config.parallel, timeout_minutes=5)
    engine = Engine(config, ranks)
    if step is not None:
        checkpoints = Checkpoints(Path(config.run_dir), keep=9)
        manifest = checkpoints.choose(ranks, step=step)
        check_coverage(manifest, engine.tensors())
        fragments = [*engine.fragments(), *engine.buffers()]
        load(checkpoints.path(step), manifest, fragments)
        engine.finish_load(updates=step)
    return engine, ranks


def save(engine: Engine, ranks: Ranks, config: RunConfig, step: int) -> None:
    checkpoints = Checkpoints(Path(config.run_dir), keep=9)
    checkpoints.save(step, engine.fragments(), ranks=ranks, about=ABOUT)


def state_of(engine: Engine) -> dict[str, Tensor]:
    return {f"{part.name}@{part.start}": part.data.clone() for part in engine.fragments()}


def config_of(folder: Path, choice: OptimizerConfig, *, ranks: int = 2, **layout: Any) -> RunConfig:
    parallel = ParallelConfig(micro_batch_size=2, **layout)
    keeping = CheckpointConfig(asynchronous=False)
    config = tiny_run(folder, optimizer=choice, parallel=parallel, checkpoint=keeping)
    check_run(config, num_ranks=ranks)
    return config


HOST = {"offload_optimizer": Offload.cpu}
DISK = {"offload_optimizer": Offload.nvme, "nvme_path": tempfile.gettempdir()}
LAYOUTS: list[Any] = [
    pytest.param({"expert": 2, "zero_stage": 2}, Dtype.fp32, id="ZeRO 2"),
    *(
        pytest.param(layout, dtype, marks=pytest.mark.slow, id=f"{name}, {dtype}")
        for name, layout, dtype in (
            ("ZeRO 1", {"expert": 2, "zero_stage": 1}, Dtype.fp32),
            ("ZeRO 1", {"expert": 2, "zero_stage": 1}, Dtype.bf16),
            ("ZeRO 0", {"expert": 2, "zero_stage": 0}, Dtype.bf16),
            ("ZeRO 3", {"expert": 2, "zero_stage": 3}, Dtype.bf16),
            ("host", {"expert": 2, "zero_stage": 1, **HOST}, Dtype.bf16),
            ("disk", {"expert": 2, "zero_stage": 3, **DISK}, Dtype.bf16),
            ("pipeline", {"zero_stage": 1, "pipeline": 2}, Dtype.bf16),
        )
    ),
]


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_resumed_run_equals_one_that_never_stopped(
    tmp_path: Path, choice: str, layout: dict[str, Any], dtype: Dtype
) -> None:
    if choice == "muon" and (layout["zero_stage"] == 3 or "offload_optimizer" in layout):
        with pytest.raises(ValueError, match=r"optimizer.kind=muon don't go together"):
            config_of(tmp_path, CHOICES[choice], **layout)
        return
    config = config_of(tmp_path, CHOICES[choice], **layout)
    config.precision.dtype = dtype

    def be_rank() -> None:
        engine, ranks = start(config)
        train_steps(engine, ranks, config, range(2))
        save(engine, ranks, config, 2)
        expected_losses = train_steps(engine, ranks, config, range(2, 4))
        expected = state_of(engine)
        again, _ = start(config, step=2)
        assert train_steps(again, ranks, config, range(2, 4)) == expected_losses
        got = state_of(again)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name
            assert tensor.any(), f"{name} is still zero: nothing was compared"

    run_ranks(2, be_rank)


@pytest.mark.parametrize(
    ("before", "after"), [(a, b) for a in Moments for b in Moments if a is not b]
)
def test_moments_of_one_precision_load_into_another(
    tmp_path: Path, before: Moments, after: Moments
) -> None:
    def be_rank() -> None:
        saved = config_of(tmp_path, OptimizerConfig(moments=before), ranks=1)
        engine, ranks = start(saved)
        train_steps(engine, ranks, saved, range(1))
        save(engine, ranks, saved, 1)
        continued = config_of(tmp_path, OptimizerConfig(moments=after), ranks=1)
        expected, got = state_of(engine), state_of(start(continued, step=1)[0])
        for name, values in expected.items():
            kind = name.split("/")[0]  # a block's scale may come from another tensor of the kind
            scale = max(v.abs().max() for n, v in expected.items() if n.startswith(f"{kind}/"))
            error = (got[name].float() - values.float()).abs().max() / scale
            assert error <= COARSEST[after], name

    run_ranks(1, be_rank)


@pytest.mark.parametrize(
    "choice",
    [pytest.param(c, marks=[] if c in ("adamw", "muon") else pytest.mark.slow) for c in CHOICES],
)
def test_a_step_with_gradients_that_are_not_finite_changes_nothing(
    tmp_path: Path, choice: str
) -> None:
    """One rank's are not; both skip. Then every group follows the schedule's rate again."""
    config = config_of(tmp_path, CHOICES[choice], expert=2, zero_stage=2)

    def be_rank() -> None:
        engine, ranks = start(config)
        train_steps(engine, ranks, config, range(1))
        before = state_of(engine)
        if ranks.rank == 1:
            weight = engine.model.norm.weight
            poison = weight.register_hook(lambda grad: grad * float("nan"))
        batches = random_batches(1, rank=ranks.rank, num_ranks=ranks.count, micro_batch_size=2)
        over = count_denominators(batches, config.model, ranks)
        report = update(engine, batches, over, config=config.model, lr=0.5)
        assert not report.is_applied
        after = state_of(engine)
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), name
        if ranks.rank == 1:
            poison.remove()
        train_steps(engine, ranks, config, range(1, 2))
        for group in engine._optimizer.param_groups:
            assert group["lr"] == 1e-3
            (flat,) = group["params"]
            assert engine._optimizer.state[flat]["step"] == 2

    run_ranks(2, be_rank)


@pytest.mark.parametrize(
    ("before", "after", "missing", "way_out"),
    [
        (
            OptimizerConfig(),
            MuonConfig(),
            "momentum/layers.0.attention.q_down.weight",
            ["momentum/*", "exp_avg*/*"],
        ),
        (
            MuonConfig(),
            OptimizerConfig(),
            "exp_avg/layers.0.attention.q_down.weight",
            ["exp_avg*/*"],
        ),
    ],
)
def test_another_algorithm_is_refused_unless_its_missing_state_is_named(
    corpus: Path,
    tmp_path: Path,
    before: OptimizerConfig,
    after: OptimizerConfig,
    missing: str,
    way_out: list[str],
) -> None:
    """With the message's own way out the run starts: what was missing from zero, the rest kept."""
    config = tiny_run(tmp_path, optimizer=before)
    config.data.folder = str(corpus)
    config.schedule.steps = 2
    Path(config.run_dir).mkdir(parents=True)

    def be_rank() -> None:
        ranks = join(config.parallel, timeout_minutes=5)
        train(config, ranks)
        saved = state_of(Run(config, ranks).engine)
        config.optimizer = after
        with pytest.raises(ValueError, match="keeps") as error:
            Run(config, ranks)
        message = str(error.value)
        assert f"optimizer.kind={after.kind} keeps {missing}, which step 2's checkpoint" in message
        assert f"choose optimizer={before.kind}, or" in message
        assert re.findall(r"=\[(.*?)\]", message) == way_out
        config.checkpoint.allow_missing = way_out[:1]
        config.checkpoint.allow_surplus = way_out[1:]
        got = state_of(Run(config, ranks).engine)
        assert f"{missing}@0" in got.keys() - saved.keys()
        for name, tensor in got.items():
            expected = saved[name] if name in saved else torch.zeros_like(tensor)
            assert torch.equal(tensor, expected), name

    run_ranks(1, be_rank)
