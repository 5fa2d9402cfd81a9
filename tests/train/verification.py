"""`thrifty verify` without its processes: the layout on forked ranks, the reference here."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tests.ranks import run_ranks
from train.config import RunConfig, check_run
from train.engine.engine import join
from train.verify.compare import Comparison, compare
from train.verify.config import LEARNING_RATE, TOLERANCE
from train.verify.measure import build_measure
from train.verify.observe import observe
from train.verify.plain import observe_plainly
from train.verify.rank import count_orders

Bug = Callable[[], AbstractContextManager[Any]]


def verify(
    config: RunConfig, num_ranks: int, *, steps: int = 2, bug: Bug = nullcontext
) -> Comparison:
    """The layout's steps, with a bug patched into its ranks, against plain PyTorch's."""
    check_run(config, num_ranks=num_ranks)
    device = torch.device("cpu")
    reference, *others = (
        list(observe_plainly(config, steps=steps, lr=LEARNING_RATE, device=device, order=order))
        for order in range(count_orders(config))
    )

    def on_rank() -> list[Any]:
        with bug():
            ranks = join(config.parallel, timeout_minutes=5)
            return list(observe(config, ranks, steps=steps, lr=LEARNING_RATE))

    got = [
        fragment for of_rank in run_ranks(num_ranks, on_rank, seconds=300) for fragment in of_rank
    ]
    measure = build_measure(reference, others, config, tolerance=TOLERANCE)
    return compare(reference, got, measure=measure)
