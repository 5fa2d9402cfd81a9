"""What ranks do for `thrifty verify`: take the steps, and write down what they observe of them."""

import logging
from collections.abc import Iterator
from pathlib import Path

from train.checkpoint.manifest import Fragment
from train.config import RunConfig
from train.outcome import Outcome, Status
from train.precision import Dtype
from train.ranks import Ranks, read_device
from train.verify.config import LEARNING_RATE, ObservedRun
from train.verify.observation import write_observations
from train.verify.observe import observe
from train.verify.plain import observe_plainly
from train.verify.spread import ORDERS

OBSERVED_FILE = "verify.yaml"  # in place of a run's config.yaml

log = logging.getLogger(__name__)


def layout_path(folder: Path, rank: int) -> Path:
    return folder / f"layout-{rank:05}.pt"


def reference_path(folder: Path, order: int) -> Path:
    return folder / f"reference-{order}.pt"


def count_orders(config: RunConfig) -> int:
    """References that are needed: in BF16 some in other orders, to know what is rounding."""
    return 1 if config.precision.dtype is Dtype.fp32 else 1 + ORDERS


def observe_reference(config: ObservedRun) -> None:
    """Take the reference's steps, in this process alone: the first rank, before it has a group."""
    steps = config.verify.steps
    for order in range(count_orders(config)):
        seen = observe_plainly(
            config, steps=steps, lr=LEARNING_RATE, device=read_device(), order=order
        )
        who = "plain PyTorch" + (f", order {order}" if order else "")
        path = reference_path(Path(config.run_dir), order)
        write_observations(path, _report_steps(seen, who, steps))


def observe_layout(config: ObservedRun, ranks: Ranks) -> Outcome:
    """Take the layout's steps, as one of its ranks."""
    seen = observe(config, ranks, steps=config.verify.steps, lr=LEARNING_RATE)
    path = layout_path(Path(config.run_dir), ranks.rank)
    write_observations(path, _report_steps(seen, "the layout", config.verify.steps))
    return Outcome(status=Status.finished, step=config.verify.steps)


def _report_steps(fragments: Iterator[Fragment], who: str, steps: int) -> Iterator[Fragment]:
    """The fragments as they come; says which step has been taken."""
    step = ""
    for fragment in fragments:
        if not fragment.name.startswith(f"{step}/"):
            step = fragment.name.split("/")[0]
            log.info("%s: step %s of %d", who, step, steps)
        yield fragment
