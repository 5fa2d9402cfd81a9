"""`python -m bench.step_products`: how fast `bench.step`'s step could be at its products' sizes.

A large square product's rate is out of reach of narrow ones. Here a step's products (every expert
with equally many tokens) and its attention kernels are recorded, and each is then timed alone, its
operands warm. The sum of their least times bounds the step from below, as long as these kernels do
the work; the optimizer's bytes are added at the rate of a large copy.
"""

import math
from collections import Counter, defaultdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from bench.floors import describe, measure_floors
from bench.rows import Row, note
from bench.step import BATCH_SIZE, OURS, ROUNDS, SEQ_LEN, our_step
from bench.timing import median_seconds, prepare, seconds
from model.cost import count_parameters, flops_per_token
from train.profile.work import Work

REPEATS = 15
ATTENTION = "scaled_dot_product"
PRODUCTS = ("mm", "addmm", "bmm", "mv", "addmv")
BYTES_PER_UPDATE = 7 * 4  # gradient, weight and both moments in; weight and moments out


class Layout(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Call(NamedTuple):
    function: OpOverload
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def kind(self) -> str:
        return "attention" if ATTENTION in self.function.name() else "products"


class Recorder(TorchDispatchMode):
    """Counts what a computation multiplies, by function and layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in PRODUCTS or ATTENTION in name:
            options = tuple((key, without_values(value)) for key, value in (kwargs or {}).items())
            self.calls[Call(func, tuple(map(without_values, args)), options)] += 1
        return func(*args, **(kwargs or {}))


def without_values(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Layout(tuple(argument.shape), argument.stride())
    return argument


def with_values(argument: Any) -> Any:
    if not isinstance(argument, Layout):
        return argument
    last = sum((n - 1) * step for n, step in zip(argument.shape, argument.stride, strict=True))
    return (0.02 * torch.randn(last + 1)).as_strided(argument.shape, argument.stride)


def least_seconds(call: Call) -> float:
    """The best time of the call alone."""
    arguments = [with_values(argument) for argument in call.arguments]
    options = {key: with_values(value) for key, value in call.options}
    again = partial(call.function, *arguments, **options)
    return min(seconds(again) for _ in range(REPEATS))


def flops(call: Call) -> float:
    """Of a product: two for each element of the factors' shared index."""
    factors = [argument.shape for argument in call.arguments if isinstance(argument, Layout)]
    left, right = factors[-2:]
    return 2 * math.prod(left) * (right[-1] if len(right) > 1 else 1)


def main() -> None:
    device = torch.device("cpu")
    prepare()
    floors = measure_floors(device, torch.float32)
    step = our_step(device, is_balanced=True)
    measured = median_seconds({"ours": step}, rounds=ROUNDS)["ours"]
    with Recorder() as recorder:
        step()

    least: dict[str, float] = defaultdict(float)
    lines = []
    for call, count in recorder.calls.items():
        once = least_seconds(call)
        least[call.kind] += count * once
        if call.kind == "products":
            shapes = " x ".join(
                str(list(argument.shape))
                for argument in call.arguments
                if isinstance(argument, Layout)
            )
            share = flops(call) / once / floors.flops
            lines.append((count * once, f"{count:4} times {shapes}: {share:.0%} of the rate"))
    for total, line in sorted(lines, reverse=True)[:20]:
        print(f"{total * 1e3:7.1f} ms  {line}")

    tokens = BATCH_SIZE * SEQ_LEN
    work = Work(flops=tokens * flops_per_token(OURS, seq_len=SEQ_LEN))
    least["optimizer's bytes"] = count_parameters(OURS).total * BYTES_PER_UPDATE / floors.bytes
    for kind, total in least.items():
        print(f"{total * 1e3:7.1f} ms  {kind}, in all")
    bound = sum(least.values())
    note(Row("step's kernels alone, routing balanced", describe(bound, work, floors)))
    note(
        Row(
            "step, routing balanced: ours",
            describe(measured, work, floors),
            "",
            f"{bound / measured:.0%} of it are these kernels",
        )
    )


if __name__ == "__main__":
    main()
