"""Ranks that have little to do must not leave the others waiting."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from data.samples import IGNORED
from model.router import Router, Routing
from tests.ranks import run_ranks
from tests.train.tiny import random_batches, tiny_run
from train.engine.engine import Engine, join
from train.layout.parallel import ZERO_STAGES, ParallelConfig
from train.update import count_denominators, update


def to_the_first_experts(router: Router, tokens: torch.Tensor) -> Routing:
    """All tokens to experts 0 and 1, which are the first rank's."""
    scores = torch.nn.functional.linear(tokens, router.weight).sigmoid()
    ids = torch.tensor([0, 1]).expand(len(tokens), 2)
    return Routing(ids.contiguous(), scores[:, :2].contiguous(), scores)


@pytest.mark.parametrize(
    "zero_stage", [pytest.param(s, marks=[] if s == 3 else pytest.mark.slow) for s in ZERO_STAGES]
)
def test_no_rank_waits_for_one_without_tokens_or_whose_batch_is_padding(
    tmp_path: Path, zero_stage: int
) -> None:
    parallel = ParallelConfig(expert=2, micro_batch_size=2, zero_stage=zero_stage, keep_whole=0)
    config = tiny_run(tmp_path, parallel=parallel)

    def starve() -> Any:
        ranks = join(parallel, timeout_minutes=5)
        engine = Engine(config, ranks)
        reports = []
        for step in range(3):
            batches = random_batches(
                step, rank=ranks.rank, num_ranks=ranks.count, micro_batch_size=2
            )
            if ranks.rank == 1:  # its batch ends after one micro-batch: the rest is padding
                batches[1].targets.fill_(IGNORED)
                batches[1].is_real.fill_(False)
            over = count_denominators(batches, config.model, ranks)
            reports.append(update(engine, batches, over, config=config.model, lr=1e-3))
        return [(report.is_applied, report.load) for report in reports]

    with mock.patch.object(Router, "forward", to_the_first_experts):
        for is_applied, load in run_ranks(2, starve, seconds=300)[0]:
            assert is_applied
            assert (load[:, :2] > 0).all()
            assert (load[:, 2:] == 0).all(), "the second rank's experts got a token"
