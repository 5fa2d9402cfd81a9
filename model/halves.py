"""Two halves of a micro-batch in turns: while one's rows travel, the other is computed.

What sends rows is written as steps: a generator that yields whenever rows have departed and returns
what it comes to. Whoever has two such runs lets each go on to its next departure in turn. Both are
in one graph, and autograd takes what was made last first: the backward pass takes the same turns,
the other way round.
"""

from collections.abc import Generator
from itertools import accumulate
from typing import NamedTuple, TypeVar

from torch import Tensor

Output = TypeVar("Output")
Steps = Generator[None, None, Output]


def in_turns(*runs: Steps[Output]) -> list[Output]:
    """What the runs come to, in their order. All yield equally often."""
    outputs: list[Output] = []
    while not outputs:
        for run in runs:
            try:
                next(run)
            except StopIteration as end:
                outputs.append(end.value)
    assert len(outputs) == len(runs), "runs that take turns have equally many steps"
    return outputs


class Halves(NamedTuple):
    """The first sequences and as many others."""

    first: Tensor
    second: Tensor


def halve(of_sequences: Tensor) -> Halves:
    """Views of each half of an even number of sequences."""
    assert len(of_sequences) % 2 == 0, "layout_rules.py asks for an even micro-batch"
    return Halves(*of_sequences.chunk(2))


def halve_segments(segments: list[int]) -> tuple[list[int], list[int]]:
    """The documents' lengths in each half; none lies in both."""
    ends = list(accumulate(segments))
    middle = 1 + ends.index(ends[-1] // 2)
    return segments[:middle], segments[middle:]
