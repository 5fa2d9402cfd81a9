"""`thrifty verify` without its processes: the layout on forked ranks, the reference here."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tests.ranks import run_ranks
from train.config import RunConfig, check_run
from train.engine import join
from train.verify.compare import Comparison, compare
from train.verify.config import LEARNING_RATE, TOLERANCE, moment_tolerance
from train.verify.observe import observe
from train.verify.plain import observe_plainly

Bug = Callable[[], AbstractContextManager[Any]]


def verify(
    config: RunConfig, num_ranks: int, *, steps: int = 2, bug: Bug = nullcontext
) -> Comparison:
    """The layout's steps, with a bug patched into its ranks, against plain PyTorch's."""
    check_run(config, num_ranks=num_ranks)
    device = torch.device("cpu")
    expected = observe_plainly(config, steps=steps, lr=LEARNING_RATE, device=device)

    def on_rank() -> list[Any]:
        with bug():
            ranks = join(config.parallel, timeout_minutes=1)
            return list(observe(config, ranks, steps=steps, lr=LEARNING_RATE))

    got = [fragment for of_rank in run_ranks(num_ranks, on_rank) for fragment in of_rank]
    moments = moment_tolerance(TOLERANCE, config.optimizer.moments)
    return compare(expected, got, tolerance=TOLERANCE, moment_tolerance=moments)
