"""The samples of any step of a run, found again from its folder: from where in the data the step
began, as the nearest checkpoint and the journal tell, with the blend that held then."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data.blend import SourceConfig, StageConfig
from data.config import DataConfig, MixtureData, Verify
from data.fim import FimConfig, FimMode
from data.mixture import Row
from data.packing import Packing
from data.position import Position
from data.rows import Rows
from data.training_data import TrainingData
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import read_manifest
from train.config import CONFIG_FILE, RunConfig, read_config
from train.journal import read_records
from train.progress import read_progress
from train.schedule import batch_size

CHUNK = 4096  # samples that are drawn at once on the way


class Stretch(NamedTuple):
    """The samples that a step consumed: `size` of them from number `first` on."""

    first: int
    size: int


class StepSamples(NamedTuple):
    """A step's samples in order: what each is made of, and its content as the step read it."""

    stretch: Stretch
    rows: list[Row]
    contents: list[Rows]  # of one row each
    data: TrainingData


def read_step(run_dir: Path, step: int) -> StepSamples:
    """The samples that step `step` (the first is 1) read.

    Raises:
        ValueError: No such step, or too little is left to tell where it began.
    """
    config = read_config(run_dir / CONFIG_FILE, RunConfig)
    positions = saved_positions(run_dir)
    stretch = find_stretch(run_dir, step, config, positions)
    blends = max(positions.values(), key=lambda at: at.samples, default=Position()).blends
    position = max(
        (at for at in positions.values() if at.samples <= stretch.first),
        key=lambda at: at.samples,
        default=Position(),
    )
    if not blends:  # no checkpoint yet: all was read as the config says
        data = _open(config.data, config.seed)
        position = data.enter(position)
        position = _advance(data, position, stretch.first)
    else:
        for blend, end in _blends_from(blends, position.samples, stretch.first):
            data = _open(_as_blended(config.data, blend), blend["seed"])
            position = _advance(data, data.enter(position), end)
    drawn = data.draw(position, stretch.size)
    rows = list(drawn.rows)
    return StepSamples(stretch, rows, data.read(rows, 1), data)


def saved_positions(run_dir: Path) -> dict[int, Position]:
    """Where in its data the run stood after each step of which there is a checkpoint."""
    checkpoints = Checkpoints(run_dir)
    return {
        step: read_progress(read_manifest(checkpoints.path(step)).progress).data
        for step in checkpoints.steps()
    }


def find_stretch(
    run_dir: Path, step: int, config: RunConfig, positions: dict[int, Position]
) -> Stretch:
    """Which samples a step consumed: from what is known of steps around it, and the schedule.

    Raises:
        ValueError: The run has not done this step, or changed its batch size unrecorded.
    """
    known = {0: 0}
    known |= {r["step"]: r["samples"] for r in read_records(run_dir, event="step")}
    known |= {done: position.samples for done, position in positions.items()}
    last = max(known)
    if not 1 <= step <= last:
        raise ValueError(f"step={step}: {run_dir} has done the steps 1 to {last}; choose one")
    before = max(done for done in known if done < step)
    after = min(done for done in known if done >= step)
    sizes = [batch_size(config.schedule, done) for done in range(before, after)]
    if len(sizes) == 1:
        sizes = [known[after] - known[before]]
    if known[before] + sum(sizes) != known[after]:
        raise ValueError(
            f"step={step}: the batch size changed between the steps {before} and {after}, and "
            f"where is not recorded; choose a step near another one, such as {before} or {after}"
        )
    passed = step - 1 - before
    return Stretch(known[before] + sum(sizes[:passed]), sizes[passed])


def _blends_from(
    blends: tuple[dict[str, Any], ...], start: int, end: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """The blends that held from sample `start` to `end`, each with the sample where it ended."""
    for blend, following in zip(blends, (*blends[1:], None), strict=True):
        stops = end if following is None else min(following["samples"], end)
        is_last = following is None or following["samples"] > end
        if stops > start or is_last:
            yield blend, stops
        if is_last:
            return


def _advance(data: TrainingData, position: Position, samples: int) -> Position:
    """The position after so many samples of the run."""
    while position.samples < samples:
        position = data.draw(position, min(samples - position.samples, CHUNK)).position
    return position


def _open(config: DataConfig, seed: int) -> TrainingData:
    return TrainingData(replace(config, verify=Verify.fast), seed=seed)


def _as_blended(config: DataConfig, blend: dict[str, Any]) -> DataConfig:
    """The config as it was when the blend was noted; folders are where they are now."""
    fim = FimConfig(rate=blend["fim"]["rate"], mode=FimMode(blend["fim"]["mode"]))
    packing = Packing(blend["packing"])
    config = replace(config, seq_len=blend["seq_len"], packing=packing, fim=fim)
    if not isinstance(config, MixtureData):
        return config
    folders = {source.name: source.folder for source in config.sources}
    if missing := sorted(blend["sources"].keys() - folders.keys()):
        raise ValueError(
            f"the run read the sources {', '.join(missing)} then, which data.sources no longer "
            "names; name them again, with weight 0"
        )
    sources = [
        SourceConfig(
            name=name,
            folder=folders[name],
            weight=about["weight"],
            max_epochs=about["max_epochs"],
        )
        for name, about in blend["sources"].items()
    ]
    return replace(config, sources=sources, stages=[StageConfig(**s) for s in blend["stages"]])
