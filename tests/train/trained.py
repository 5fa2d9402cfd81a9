"""What a few steps of training leave, whatever the layout, and whether two of them are the same."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from tests.ranks import run_ranks
from tests.train.tiny import random_batches, tiny_model, tiny_run
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import RunConfig, check_run
from train.engine.engine import Engine, join
from train.journal import read_records
from train.layout.parallel import ParallelConfig
from train.loop import train
from train.optimizer.config import OptimizerConfig
from train.precision import Dtype, PrecisionConfig
from train.ranks import Ranks
from train.update import count_denominators, update

STEPS = 3


class Trained(NamedTuple):
    losses: Tensor  # [STEPS, 4 + M]
    norms: Tensor  # [STEPS]
    loads: Tensor  # [STEPS, L, E]
    state: dict[str, Tensor]  # logical tensors, flattened


def train_steps(config: RunConfig) -> Trained:
    """Three steps from the same start on the same global batches, on the ranks of this group."""
    ranks = join(config.parallel, timeout_minutes=5)
    engine = Engine(config, ranks)
    losses, norms, loads = [], [], []
    for step in range(STEPS):
        batches = random_batches(
            step,
            rank=ranks.replica,
            num_ranks=ranks.num_replicas,
            micro_batch_size=config.parallel.micro_batch_size,
        )
        over = count_denominators(batches, config.model, ranks)
        report = update(engine, batches, over, config=config.model, lr=1e-4)
        assert report.is_applied
        losses.append(report.losses)
        norms.append(report.grad_norm)
        loads.append(report.load)
    state = gather_state(engine, ranks)
    return Trained(torch.stack(losses), torch.tensor(norms), torch.stack(loads), state)


def gather_state(engine: Engine, ranks: Ranks) -> dict[str, Tensor]:
    """Every logical tensor put together from its owners' fragments."""
    owned = [(part.name, part.start, part.data.detach().clone()) for part in engine.fragments()]
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for share in ranks.gather(owned):
        for name, start, data in share:
            parts.setdefault(name, []).append((start, data))
    return {
        name: torch.cat([data for _, data in sorted(runs, key=lambda run: run[0])])
        for name, runs in parts.items()
    }


def train_layout(
    folder: Path,
    num_ranks: int,
    *,
    accumulation: int = 1,
    dtype: Dtype = Dtype.fp32,
    fp8: bool = False,
    model: ModelConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    **layout: Any,
) -> Trained:
    """The first rank's view of three steps on a layout; eight sequences make a global batch."""
    num_replicas = num_ranks // (layout.get("sequence", 1) * layout.get("pipeline", 1))
    parallel = ParallelConfig(micro_batch_size=8 // num_replicas // accumulation, **layout)
    config = tiny_run(
        folder,
        model=model or tiny_model(),
        optimizer=optimizer or OptimizerConfig(),
        parallel=parallel,
        precision=PrecisionConfig(dtype=dtype, fp8=fp8),
        checkpoint=CheckpointConfig(asynchronous=False),
    )
    check_run(config, num_ranks=num_ranks)
    return run_ranks(num_ranks, lambda: train_steps(config), seconds=300)[0]


def assert_same_training(got: Trained, expected: Trained) -> None:
    """Losses, norms, weights and moments to 1e-5; counts and biases exactly."""
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.norms, expected.norms, rtol=1e-5, atol=0)
    assert torch.equal(got.loads, expected.loads)
    assert got.state.keys() == expected.state.keys()
    for name, wanted in expected.state.items():
        if name.startswith("buffer/"):
            assert torch.equal(got.state[name], wanted), name
        else:
            assert got.state[name].shape == wanted.shape, name
            error = (got.state[name] - wanted).abs().max() / wanted.abs().max()
            assert error <= 1e-5, f"{name} differs by {error:.1e}"


def run_on(
    folder: Path,
    corpus: Path,
    num_ranks: int,
    *,
    model: ModelConfig,
    steps: int,
    dtype: Dtype = Dtype.fp32,
    **layout: Any,
) -> dict[str, Any]:
    """A run, begun or continued; its records so far, by event and step."""
    config = tiny_run(folder, model=model, precision=PrecisionConfig(dtype=dtype))
    config.parallel = ParallelConfig(micro_batch_size=4, **layout)
    config.data.folder, config.schedule.steps = str(corpus), steps
    config.evaluation.max_sequences = 6  # the last batch of a replica is partly padding
    check_run(config, num_ranks=num_ranks)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    run_ranks(num_ranks, lambda: train(config, join(config.parallel, timeout_minutes=5)))
    return {
        f"{event} {record['step']}": record
        for event in ("step", "evaluation")
        for record in read_records(Path(config.run_dir), event=event)
    }


def assert_same_records(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every step's data and numbers, and the last evaluation's, to 1e-5."""
    exact = ("samples", "targets")
    steps = {event: record for event, record in expected.items() if event.startswith("step")}
    *_, last = (event for event in expected if event.startswith("evaluation"))
    for event in (*steps, last):
        for name in ("loss", "mtp_loss_1", "balance_loss", "grad_norm", "max_vio", *exact):
            if name in expected[event]:
                wanted = pytest.approx(expected[event][name], rel=0 if name in exact else 1e-5)
                assert got[event][name] == wanted, (event, name)
