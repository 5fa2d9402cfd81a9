"""`python -m bench.grow_plot IMAGE LABEL=RUN[,RUN...] ...`: validation loss by step.

Draws the mean of the runs of a label (several seeds) at each step where all were evaluated, the
runs themselves beneath, and prints the last step's losses as a Markdown table.
"""

import argparse
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

from train.journal import read_records

Losses = dict[int, float]  # by step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.grow_plot", description=__doc__)
    parser.add_argument("image", type=Path, help="where the plot goes; its ending is its format")
    parser.add_argument("lines", nargs="+", metavar="LABEL=RUN[,RUN...]")
    arguments = parser.parse_args()
    lines = {}
    for text in arguments.lines:
        label, _, folders = text.partition("=")
        lines[label] = [read_losses(Path(folder)) for folder in folders.split(",")]
    draw(lines, arguments.image)
    print_table(lines)


def read_losses(run_dir: Path) -> Losses:
    records = read_records(run_dir, event="evaluation")
    return {record["step"]: record["loss"] for record in records}


def draw(lines: dict[str, list[Losses]], image: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for number, (label, runs) in enumerate(lines.items()):
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        axes.plot(
            steps,
            [mean(run[step] for run in runs) for step in steps],
            color=f"C{number}",
            label=label,
        )
        for run in runs:
            axes.plot(list(run), list(run.values()), color=f"C{number}", alpha=0.25, linewidth=0.8)
    last = [run[max(run)] for runs in lines.values() for run in runs]
    axes.set_ylim(min(last) - 0.05, min(last) + 0.7)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats per token")
    axes.legend()
    axes.grid(alpha=0.3)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={"Date": None} if image.suffix == ".svg" else None)


def print_table(lines: dict[str, list[Losses]]) -> None:
    print("| experts | validation loss of each run | mean |\n|---|---|---|")
    for label, runs in lines.items():
        last = [run[max(run)] for run in runs]
        print(f"| {label} | {', '.join(f'{loss:.3f}' for loss in last)} | {mean(last):.3f} |")


if __name__ == "__main__":
    main()
