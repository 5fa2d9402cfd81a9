"""Where a run stands: everything that a resumed run continues from besides tensors."""

from dataclasses import dataclass, field
from typing import Any

from data.position import Position, read_position


@dataclass(slots=True, kw_only=True)
class Progress:
    step: int = 0  # global batches consumed
    data: Position = field(default_factory=Position)  # how far each source was read, and how
    targets: int = 0  # tokens that were predicted
    skipped: int = 0  # steps whose gradients were not finite
    skipped_in_a_row: int = 0
    held_out: str = ""  # fingerprint of the text that evaluations are of
    without_fp8: list[str] = field(default_factory=list)  # layers that drifted too far in it

    def advance(self, data: Position, targets: int, *, is_applied: bool) -> None:
        """Note one global batch, consumed whether or not its update was applied."""
        self.step += 1
        self.data = data
        self.targets += targets
        self.skipped += not is_applied
        self.skipped_in_a_row = 0 if is_applied else self.skipped_in_a_row + 1

    @property
    def samples(self) -> int:
        """Sequences that were read."""
        return self.data.samples

    @property
    def updates(self) -> int:
        """Updates applied, as AdamW's bias correction counts them."""
        return self.step - self.skipped


def read_progress(values: dict[str, Any]) -> Progress:
    """The progress from its form in a checkpoint's manifest.

    Raises:
        ValueError: It was written before positions were kept by source.
    """
    if "data" not in values:
        raise ValueError(
            "the checkpoint keeps its place in the data as one number, which earlier versions "
            "did; this version reads in another order. Start a new run from its weights: "
            "init_from=RUN_DIR"
        )
    return Progress(**{**values, "data": read_position(values["data"])})


def refuse_divergence(progress: Progress, *, limit: int) -> None:
    """Stop a run that only skips.

    Raises:
        FloatingPointError: `limit` steps in a row had gradients that were not finite.
    """
    if progress.skipped_in_a_row >= limit:
        raise FloatingPointError(
            f"the gradients of {progress.skipped_in_a_row} steps in a row were not finite, up to "
            f"step {progress.step} (optimizer.max_skipped_steps={limit}); delete the newest "
            "folders in checkpoints/ and start again with a lower schedule.peak_lr, or look at the "
            f"data around sample {progress.samples}"
        )
