"""By which measure a config's observations are compared."""

from train.checkpoint.manifest import Fragment
from train.config import RunConfig
from train.optimizer.moments import Moments
from train.precision import Dtype
from train.verify.compare import Measure, Tolerances
from train.verify.config import LEARNING_RATE
from train.verify.spread import measure_spread


def build_measure(
    reference: list[Fragment], others: list[list[Fragment]], config: RunConfig, *, tolerance: float
) -> Measure:
    """Tolerances in fp32; in BF16 the spread of the reference in `others` orders.

    Moments in BF16 may differ by its spacing: a rounding error decides which way one rounds.
    """
    if config.precision.dtype is Dtype.fp32:
        has_bf16 = config.optimizer.moments is Moments.bf16
        return Tolerances(tolerance, max(tolerance, 2**-8) if has_bf16 else tolerance)
    moe = config.model.moe
    speed = moe.router.bias_update_speed if moe is not None else 0.0
    return measure_spread(reference, others, lr=LEARNING_RATE, bias_speed=speed)
