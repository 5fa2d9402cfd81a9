"""What `thrifty verify` is asked for."""

from dataclasses import dataclass

from train.config import RunConfig
from train.precision import Dtype

#: fp32 rounds in the 8th digit; sums in another order differ by less than this.
TOLERANCE = 1e-5

# AdamW's first steps move every element by about this much, small gradients like large ones. Where
# a gradient cancels to nearly nothing, the sign of what rounding left decides the direction; at a
# larger rate that alone would exceed the tolerance.
LEARNING_RATE = 1e-4


@dataclass(slots=True, kw_only=True)
class VerifyConfig:
    #: Verify the config as it is, instead of shrinking model, sequences and batch until a CPU runs
    #: them in seconds. One process must be able to hold the whole model, gradients and moments.
    full: bool = False
    #: fp32: to `tolerance`. bf16: to what the order of sums alone changes, over one step (after it
    #: near-ties of the routing fall otherwise).
    precision: Dtype = Dtype.fp32
    #: Optimizer steps that are compared; the second one shows what the first leaves behind.
    steps: int = 2
    #: Largest difference of a tensor, relative to its largest value; counts and biases have none.
    tolerance: float = TOLERANCE


@dataclass(slots=True, kw_only=True)
class ObservedRun(RunConfig):
    """What `thrifty verify` writes for its ranks, in place of a run's config."""

    verify: VerifyConfig


def check_verify(config: VerifyConfig) -> None:
    """Refuse, with a ValueError, what compares nothing."""
    if config.steps < 1:
        raise ValueError(f"verify.steps={config.steps} compares nothing; choose at least 1")
    if config.tolerance <= 0:
        raise ValueError(
            f"verify.tolerance={config.tolerance} asks for equal bits, which sums in another order "
            f"don't give; choose e.g. {TOLERANCE}"
        )
