"""`python -m bench.profile_plot IMAGE LABEL=RUN ...`: where the time of runs' steps goes.

Of each run that `thrifty train profile=true` has measured: a bar for every part, forward and
backward stacked, and a mark at the least time that its work takes on the machine as measured.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from train.profile.report import PROFILE_FILE

PHASES = {"forward": "teal", "backward": "mediumturquoise", "neither": "silver"}
Profile = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_plot", description=__doc__)
    parser.add_argument("image", type=Path, help="where the plot goes; its ending is its format")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    arguments = parser.parse_args()
    profiles = {}
    for text in arguments.runs:
        label, _, folder = text.partition("=")
        profiles[label] = json.loads((Path(folder) / PROFILE_FILE).read_text())
    draw(profiles, arguments.image)


def draw(profiles: dict[str, Profile], image: Path) -> None:
    figure, columns = plt.subplots(
        1, len(profiles), figsize=(1 + 4 * len(profiles), 4), layout="constrained", squeeze=False
    )
    for axes, (label, profile) in zip(columns[0], profiles.items(), strict=True):
        draw_bars(axes, profile)
        axes.set_title(f"{label}: {profile['seconds'] * 1e3:.0f} ms", fontsize=10)
    columns[0, -1].legend(fontsize=8, loc="lower right")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={"Date": None} if image.suffix == ".svg" else None)


def draw_bars(axes: Any, profile: Profile) -> None:
    parts = profile["parts"][::-1]  # the first part on top
    names = [part["part"] for part in parts]
    lefts = [0.0] * len(parts)
    for phase, color in PHASES.items():
        widths = [milliseconds(part, phase) for part in parts]
        axes.barh(names, widths, left=lefts, color=color, label=phase)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    least = [part["least_seconds"] * 1e3 or None for part in parts]
    marks = [(x, y) for y, x in enumerate(least) if x is not None]
    axes.scatter(*zip(*marks, strict=True), marker="|", s=120, color="black", label="floor")
    for y, (part, left) in enumerate(zip(parts, lefts, strict=True)):
        axes.text(left, y, f" {part['seconds'] / profile['seconds']:.0%}", va="center", fontsize=7)
    axes.set_xlim(right=1.12 * max(lefts))
    axes.set_xlabel("ms of a step")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, axis="x")


def milliseconds(part: dict[str, float], phase: str) -> float:
    forward, backward = part["forward_seconds"], part["backward_seconds"]
    seconds = {
        "forward": forward,
        "backward": backward,
        "neither": part["seconds"] - forward - backward,
    }
    return seconds[phase] * 1e3


if __name__ == "__main__":
    main()
