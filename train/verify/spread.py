"""How much the order of sums alone changes a BF16 step: what a layout may differ by in BF16.

The reference's step is taken several times in BF16, over the same global batch in other orders
and micro-batches. Whatever these differ by is rounding. A layout adds up in yet another order, so
it may differ by FACTOR times as much from the first of them. Differences are Euclidean, of whole
tensors: single elements of a gradient scatter too much to be judged.
"""

from collections import defaultdict
from statistics import median
from typing import NamedTuple

from torch import Tensor

from train.checkpoint.manifest import Fragment
from train.verify.compare import by_tensor, component_at, join, moe_layers
from train.verify.observation import BUFFER, LOAD, LOSS, NORM, TERM, WEIGHT, Key

#: References in other orders than the first.
ORDERS = 3
#: Of the orders' largest difference. Layouts that are right reach 2.8 (docs/parallelism.md).
FACTOR = 4.0
#: Losses and norms may differ by half of BF16's spacing in any case.
LEAST = 2.0**-9
#: Weights may differ by this part of a step of every element: where a gradient is near zero, its
#: sign, and with it the whole step of AdamW, is rounding's.
OF_STEP = 0.1


class Spread(NamedTuple):
    """BF16: the difference's norm over the tensor's; of counts, choices; of biases, see `error`."""

    limits: dict[Key, float]
    bias_speed: float

    def error(self, key: Key, got: Tensor, expected: Tensor) -> float:
        """Biases may have moved otherwise, as counts differ, but only by whole steps."""
        difference = got.double() - expected.double()
        if key.quantity == BUFFER:
            steps = (difference / self.bias_speed).round() if self.bias_speed else 0.0
            return float((difference - self.bias_speed * steps).abs().max())
        if key.quantity == LOAD:
            return float(difference.abs().sum())
        norm, of_expected = float(difference.norm()), float(expected.double().norm())
        return 0.0 if norm == 0 else norm / of_expected if of_expected else float("inf")

    def limit(self, key: Key) -> float:
        return 1e-6 if key.quantity == BUFFER else self.limits.get(key, 0.0)


def measure_spread(
    first: list[Fragment], others: list[list[Fragment]], *, lr: float, bias_speed: float
) -> Spread:
    """The reference in its first order against itself in others.

    A tensor's limit is FACTOR times its own spread or, if that is more, the usual one of its
    component and quantity: an order may leave a tensor alone by chance.
    """
    reference, reordered = by_tensor(first), [by_tensor(other) for other in others]
    routed = moe_layers(reference)
    spread = Spread({}, bias_speed)
    of_kind: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    least: dict[Key, float] = {}
    for key, parts in reference.items():
        if key.quantity in (TERM, BUFFER):
            continue
        expected = join(parts)
        spread.limits[key] = max(spread.error(key, join(o[key]), expected) for o in reordered)
        of_kind[key.step, key.quantity, component_at(key, routed)].append(spread.limits[key])
        if key.quantity in (LOSS, NORM):
            least[key] = LEAST
        elif key.quantity == WEIGHT:
            least[key] = OF_STEP * lr * expected.numel() ** 0.5 / float(expected.double().norm())
    for key, own in spread.limits.items():
        usual = median(of_kind[key.step, key.quantity, component_at(key, routed)])
        spread.limits[key] = max(FACTOR * own, FACTOR * usual, least.get(key, 0.0))
    return spread
