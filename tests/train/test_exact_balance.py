"""Routing counts and biases are the same, bit for bit, however a step is spread and cut up."""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from model.recompute import Recompute
from tests.ranks import run_ranks
from tests.train.tiny import random_batches, tiny_run
from train.engine.engine import Engine, join
from train.layout.parallel import ZERO_STAGES, ParallelConfig
from train.update import count_denominators, update

BATCH_SIZE = 32  # for micro-batches of one sequence on 4 ranks with accumulation 8
ACCUMULATIONS = (1, 2, 8)
RECOMPUTES = (Recompute.none, Recompute.full)


class Balance(NamedTuple):
    loads: Tensor  # [steps, L, E]
    biases: Tensor  # [L, E]


def balance(folder: Path, ways: list[tuple[int, Recompute]], *, expert: int, stage: int) -> object:
    """On a rank: what two steps count, for each way of cutting up the same global batches."""
    found = []
    ranks = join(ParallelConfig(expert=expert, micro_batch_size=1), timeout_minutes=5)
    for accumulation, recompute in ways:
        size = BATCH_SIZE // ranks.count // accumulation
        config = tiny_run(
            folder,
            parallel=ParallelConfig(
                expert=expert, zero_stage=stage, recompute=recompute, micro_batch_size=size
            ),
        )
        engine = Engine(config, ranks)
        loads = []
        for step in range(2):
            batches = random_batches(
                step,
                rank=ranks.rank,
                num_ranks=ranks.count,
                micro_batch_size=size,
                batch_size=BATCH_SIZE,
            )
            assert len(batches) == accumulation
            over = count_denominators(batches, config.model, ranks)
            loads.append(update(engine, batches, over, config=config.model, lr=1e-4).load)
        biases = torch.stack([part.data.clone() for part in engine.buffers()])
        found.append(Balance(torch.stack(loads), biases))
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Balance:
    """One rank, everything at once."""
    folder = tmp_path_factory.mktemp("expected")
    ways = [(1, Recompute.none)]
    return run_ranks(1, lambda: balance(folder, ways, expert=1, stage=0), seconds=600)[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ZERO_STAGES)
@pytest.mark.parametrize("expert", [1, 2, 4])
def test_counts_and_biases_are_equal_for_every_accumulation_and_recomputation(
    tmp_path: Path, expected: Balance, expert: int, stage: int
) -> None:
    assert expected.biases.any(), "nothing was moved"
    ways = list(product(ACCUMULATIONS, RECOMPUTES))
    for found in run_ranks(
        max(2, expert), lambda: balance(tmp_path, ways, expert=expert, stage=stage), seconds=600
    ):
        for way, (loads, biases) in zip(ways, found, strict=True):
            assert torch.equal(loads, expected.loads), way
            assert torch.equal(biases, expected.biases), way
