"""`thrifty data show|stats run=RUN`: look at what a run reads."""

import html
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from data.atomic_file import write_aside
from data.position import Position
from data.prepared_corpus import find_tokenizer
from data.tokenizer import load_tokenizer
from data.training_data import TrainingData
from launch.html_page import bars, table, write_html
from launch.run_folder import default_to_newest
from launch.settings.compose import Job, first_word_is_the_action, run_jobs, to_config, worst
from launch.shown_samples import describe_samples, print_samples, render_samples
from train.config import CONFIG_FILE, RunConfig, read_config
from train.data_statistics import SourceStatistics, describe_sources
from train.outcome import ExitCode
from train.step_samples import read_step, saved_positions


class Action(StrEnum):
    show = "show"
    stats = "stats"


@dataclass(slots=True, kw_only=True)
class LookConfig:
    #: What to do; the first word after `thrifty data` is enough.
    action: Action = Action.show
    #: Folder of the run; the newest if it is not given.
    run: str
    #: Step whose samples are shown, from 1 on.
    step: int = 1
    #: Documents of each source that the statistics look at, evenly spread.
    documents: int = 100_000
    #: File for a page (HTML that needs nothing but itself); null prints text.
    page: str | None = None


def main() -> ExitCode:
    """Do what the first word says."""
    first_word_is_the_action(Action)
    return worst(run_jobs(look_job, schema=LookConfig, config_name="look"))


def look_job(job: Job) -> ExitCode:
    """One action; without run on the newest run."""
    default_to_newest(job.values, key="run")
    config = to_config(job.values, LookConfig)
    if config.documents < 1:
        raise ValueError(f"documents={config.documents} must be at least 1; choose e.g. 100000")
    run_dir = Path(config.run)
    if not (run_dir / CONFIG_FILE).is_file():
        raise ValueError(f"run={run_dir} holds no run (no {CONFIG_FILE}); name a run's folder")
    title, text, body = (show if config.action is Action.show else summarise)(config, run_dir)
    if config.page is None:
        print(text)
    else:
        with write_aside(Path(config.page)) as file:
            file.write(write_html(title, body).encode())
        print(f"written   {config.page}")
    return ExitCode.FINISHED


def show(config: LookConfig, run_dir: Path) -> tuple[str, str, str]:
    """Title, text and body of a page of one step's samples."""
    data = read_config(run_dir / CONFIG_FILE, RunConfig).data
    tokenizer = load_tokenizer(find_tokenizer(data))
    samples = describe_samples(config.step, read_step(run_dir, config.step), tokenizer)
    title = f"Step {config.step} of {run_dir}"
    return title, print_samples(samples), render_samples(samples)


def summarise(config: LookConfig, run_dir: Path) -> tuple[str, str, str]:
    """Title, text and body of a page of the run's sources."""
    run = read_config(run_dir / CONFIG_FILE, RunConfig)
    data = TrainingData(run.data, seed=run.seed)
    positions = saved_positions(run_dir)
    position = max(positions.values(), key=lambda at: at.samples, default=Position())
    sources = describe_sources(run, data, position, most=config.documents)
    at = f"after {position.samples:,} samples, {position.tokens:,} tokens"
    title = f"Data of {run_dir} {at}"
    headings, rows = _overview(sources, position)
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headings, *rows)
    ]
    parts = [table(headings, rows)]
    if position.tokens:
        shares = {source.name: 100 * source.read / position.tokens for source in sources}
        parts.append("<h2>Tokens read, share by source</h2>" + bars(shares, form="{:.2f} %"))
    for source in sources:
        name = f"{source.name}: documents by length in tokens (of {source.looked_at:,} looked at)"
        parts.append(f"<h2>{html.escape(name)}</h2>" + bars(source.lengths))
        lines += ["", name, *(f"  {label:>17} {n:>12,}" for label, n in source.lengths.items())]
    return title, "\n".join([title, "", *lines]), "\n".join(parts)


def _overview(
    sources: list[SourceStatistics], position: Position
) -> tuple[list[str], list[list[str]]]:
    headings = ["source", "documents", "tokens", "mean length", "weight", "read", "share"]
    headings += ["epochs", "repeated", "left out by prepare"]
    rows = [
        [
            source.name,
            f"{source.documents:,}",
            f"{source.tokens:,}",
            f"{source.mean_length:,.0f}",
            f"{source.weight:.4f}",
            f"{source.read:,}",
            f"{source.read / position.tokens:.4f}" if position.tokens else "-",
            f"{source.epochs:.3f}",
            f"{source.repeated:,} of {source.looked_at:,}",
            ", ".join(f"{name} {count:,}" for name, count in source.dropped.items()) or "-",
        ]
        for source in sources
    ]
    return headings, rows


if __name__ == "__main__":
    sys.exit(main())
