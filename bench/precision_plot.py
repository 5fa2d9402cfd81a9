"""`python -m bench.precision_plot IMAGE LABEL=RUN ...`: training loss by step, run beside run.

The runs must have read the same data. Draws means over WINDOW steps, and beneath them the
difference from the first run; prints the mean loss of the last LAST steps as a Markdown table.
"""

import argparse
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from train.journal import read_records

WINDOW, LAST = 25, 50

Losses = list[float]  # of every step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.precision_plot", description=__doc__)
    parser.add_argument("image", type=Path, help="where the plot goes; its ending is its format")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    arguments = parser.parse_args()
    runs = {}
    for text in arguments.runs:
        label, _, folder = text.partition("=")
        runs[label] = read_losses(Path(folder))
    if len({len(losses) for losses in runs.values()}) > 1:
        parser.error(
            f"not equally long: { {label: len(losses) for label, losses in runs.items()} }"
        )
    draw(runs, arguments.image)
    print_table(runs)


def read_losses(run_dir: Path) -> Losses:
    """The loss of every step of a run with `logging.every=1`, on the same samples or none."""
    records = read_records(run_dir, event="step")
    steps = [record["step"] for record in records]
    if steps != list(range(1, len(steps) + 1)):
        raise SystemExit(f"{run_dir} has no record of every step; train with logging.every=1")
    return [record["loss"] for record in records]


def draw(runs: dict[str, Losses], image: Path) -> None:
    figure, (above, below) = plt.subplots(
        2, figsize=(6, 4.5), layout="constrained", sharex=True, height_ratios=(2, 1)
    )
    first = smooth(next(iter(runs.values())))
    steps = range(WINDOW, WINDOW + len(first))
    for label, losses in runs.items():
        curve = smooth(losses)
        above.plot(steps, curve, label=label, linewidth=1)
        off = [100 * (one / other - 1) for one, other in zip(curve, first, strict=True)]
        below.plot(steps, off, linewidth=1)
    above.set_ylabel(f"loss, mean of {WINDOW} steps")
    above.legend()
    below.set_ylabel("off the first, %")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={"Date": None} if image.suffix == ".svg" else None)


def smooth(losses: Losses) -> Losses:
    return [mean(losses[i : i + WINDOW]) for i in range(len(losses) - WINDOW + 1)]


def print_table(runs: dict[str, Losses]) -> None:
    print(f"| precision | loss, mean of the last {LAST} steps | off the first |\n|---|---|---|")
    first = mean(next(iter(runs.values()))[-LAST:])
    for label, losses in runs.items():
        last = mean(losses[-LAST:])
        print(f"| {label} | {last:.4f} | {100 * (last / first - 1):+.2f} % |")


if __name__ == "__main__":
    main()
