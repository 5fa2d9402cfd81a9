"""What the profiler has seen, as a table and as a file.

Times are means over the faster half of the steps (what else a machine does falls into the other
one) and over ranks, and add up to a step's.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple, TypeVar

from train.profile.parts import Part
from train.profile.stopwatch import Label, Phase, Seconds
from train.profile.work import Work

PROFILE_FILE = "profile.json"  # in the run's folder

Step = TypeVar("Step")


class Floors(NamedTuple):
    """What the device was measured to do at most, per second."""

    flops: float  # of matrix products
    bytes: float  # read and written by a copy

    def least_seconds(self, work: Work) -> float:
        """Which no implementation of this work undercuts while its data come from memory."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


class PartTime(NamedTuple):
    """Seconds of a part in a step."""

    part: Part
    forward: float
    backward: float
    around: float
    of_ranks: list[float]  # each rank's sum of these three
    work: Work

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.around


class Profile(NamedTuple):
    parts: list[PartTime]
    whole: float  # seconds of a step that was not taken apart
    floors: Floors

    @property
    def seconds(self) -> float:
        """Of a step that was taken apart."""
        return sum(part.seconds for part in self.parts)

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "seconds": self.seconds,
            "seconds_without_profiler": self.whole,
            "flops_per_second": self.floors.flops,
            "bytes_per_second": self.floors.bytes,
            "parts": [
                {
                    "part": part.part.value,
                    "seconds": part.seconds,
                    "forward_seconds": part.forward,
                    "backward_seconds": part.backward,
                    "seconds_of_ranks": part.of_ranks,
                    "flops": part.work.flops,
                    "bytes": part.work.bytes,
                    "least_seconds": self.floors.least_seconds(part.work),
                }
                for part in self.parts
            ],
        }


def faster_half(steps: Sequence[Step], *, key: Callable[[Step], float]) -> list[Step]:
    return sorted(steps, key=key)[: (len(steps) + 1) // 2]


def mean_of_labels(steps: Sequence[Seconds]) -> Seconds:
    labels = {label for step in steps for label in step}
    return {label: mean(step.get(label, 0.0) for step in steps) for label in labels}


def put_together(
    of_ranks: Sequence[Seconds],
    *,
    whole: Sequence[float],
    work: Mapping[Part, Work],
    floors: Floors,
) -> Profile:
    """The profile of ranks' mean steps; a part that none of them has is left out."""
    parts = []
    for part in Part:
        forward, backward, around = (
            mean(seconds.get(Label(part, phase), 0.0) for seconds in of_ranks) for phase in Phase
        )
        sums = [
            sum(seconds.get(Label(part, phase), 0.0) for phase in Phase) for seconds in of_ranks
        ]
        if any(sums):
            parts.append(PartTime(part, forward, backward, around, sums, work[part]))
    return Profile(parts, mean(whole), floors)


HEAD = ("part", "forward", "backward", "ms", "of step", "GFLOP/s", "GB/s", "of floor")


def draw_table(profile: Profile) -> str:
    """A line for each part: milliseconds, and rates where its work is known."""
    has_ranks = len(profile.parts[0].of_ranks) > 1
    rows = [[*HEAD, "ranks, ms" if has_ranks else ""]]
    rows += [_row(part, profile) for part in profile.parts]
    rows.append(["a step", "", "", _ms(profile.seconds), "100.0 %", "", "", "", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    floors = profile.floors
    lines.append(
        f"Without the profiler a step takes {_ms(profile.whole)} ms. Floors, measured here and now:"
        f" {floors.flops / 1e9:,.0f} GFLOP/s in matrix products, {floors.bytes / 1e9:,.1f} GB/s in "
        "copies."
    )
    return "\n".join(lines)


def _row(time: PartTime, profile: Profile) -> list[str]:
    work, seconds, of_ranks = time.work, time.seconds, time.of_ranks
    least = profile.floors.least_seconds(work)
    return [
        time.part.value,
        _ms(time.forward) if time.forward else "",
        _ms(time.backward) if time.backward else "",
        _ms(seconds),
        f"{seconds / profile.seconds:.1%}".replace("%", " %"),
        f"{work.flops / seconds / 1e9:,.0f}" if work.flops else "",
        f"{work.bytes / seconds / 1e9:,.1f}" if work.bytes else "",
        f"{least / seconds:.0%}".replace("%", " %") if least else "",
        f"{_ms(min(of_ranks))} to {_ms(max(of_ranks))}" if len(of_ranks) > 1 else "",
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"
