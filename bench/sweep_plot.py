"""`python -m bench.sweep_plot SWEEP_FOLDER KEY IMAGE`: a sweep's validation loss against one key.

Draws one point per run and a line through the means of runs that share a value (several seeds), and
prints the same as a Markdown table, with the runs' standard deviation as their spread.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt

from launch.sweep import SWEEP_FILE

Runs = dict[int, list[dict[str, float]]]  # summaries of the finished runs by the key's value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep_plot", description=__doc__)
    parser.add_argument("folder", type=Path, help=f"the sweep's folder, which holds {SWEEP_FILE}")
    parser.add_argument("key", help="the swept key on the horizontal axis, a power of two each")
    parser.add_argument("image", type=Path, help="where the plot goes; its ending is its format")
    arguments = parser.parse_args()
    runs = read_runs(arguments.folder, arguments.key)
    draw(runs, arguments.key, arguments.image)
    print_table(runs, arguments.key)


def read_runs(folder: Path, key: str) -> Runs:
    """The sweep's finished runs, smallest value first."""
    rows: list[dict[str, Any]] = json.loads((folder / SWEEP_FILE).read_text())
    runs: Runs = defaultdict(list)
    for row in rows:
        if row["status"] == "finished":
            runs[int(row["settings"][key])].append(row["summary"])
    return dict(sorted(runs.items()))


def draw(runs: Runs, key: str, image: Path) -> None:
    losses = {value: [run["validation_loss"] for run in group] for value, group in runs.items()}
    points = [(value, loss) for value, group in losses.items() for loss in group]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(list(losses), [mean(group) for group in losses.values()], color="teal")
    axes.scatter(*zip(*points, strict=True), color="teal", s=18)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(losses), labels=[str(value) for value in losses])
    axes.set_xlabel(key)
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={"Date": None} if image.suffix == ".svg" else None)


def print_table(runs: Runs, key: str) -> None:
    print(f"| {key} | parameters | active | validation loss of each run | mean | spread |")
    print("|---|---|---|---|---|---|")
    for value, group in runs.items():
        losses = [run["validation_loss"] for run in group]
        print(
            f"| {value} | {group[0]['parameters_total'] / 1e6:.2f} M "
            f"| {group[0]['parameters_active'] / 1e6:.2f} M "
            f"| {', '.join(f'{loss:.3f}' for loss in losses)} | {mean(losses):.3f} "
            f"| {f'{stdev(losses):.3f}' if len(losses) > 1 else '-'} |"
        )


if __name__ == "__main__":
    main()
