"""What the checkpoints of a run are worth, how two of them differ, and the mean of several.

Tensors are read one at a time; nothing needs an accelerator or the run's ranks.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.integrity import CheckpointVerify, verify_files
from train.checkpoint.manifest import Manifest, Origin, Parent, read_manifest
from train.checkpoint.stored_tensors import StoredTensors
from train.checkpoint.stream_checkpoint import Run, write_checkpoint
from train.code_version import code_version
from train.config import CONFIG_FILE, RunConfig, describe_config, read_config, write_config
from train.config_diff import Change, diff_values

LAYER = re.compile(r"(layers|mtp)\.\d+\.(block\.)?")


class Health(NamedTuple):
    """A checkpoint of a list. `manifest` is None where it can't be read."""

    step: int
    manifest: Manifest | None
    num_bytes: int
    problem: str  # empty where there is none


class Difference(NamedTuple):
    """Between two checkpoints."""

    changes: list[Change]  # of the config
    only_first: list[str]  # names of tensors
    only_second: list[str]
    relative: dict[str, float]  # by kind and component: |b - a| / |a|, Euclidean


def list_checkpoints(run_dir: Path, *, verify: CheckpointVerify) -> list[Health]:
    """Every finished checkpoint of the run, oldest first, and what is wrong with it.

    Raises:
        ValueError: The run has none.
    """
    checkpoints = Checkpoints(run_dir)
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{checkpoints.folder} has no checkpoint")
    return [_examine(checkpoints.path(step), step, verify) for step in steps]


def find_manifest(run_dir: Path, step: int | None) -> tuple[Path, Manifest]:
    """Folder and manifest of a step's checkpoint; with None the last one's.

    Raises:
        ValueError: There is no such checkpoint, or its manifest can't be read.
    """
    checkpoints = Checkpoints(run_dir)
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        raise ValueError(f"step={step} has no checkpoint in {checkpoints.folder}; there is {steps}")
    folder = checkpoints.path(steps[-1] if step is None else step)
    return folder, read_manifest(folder)


def diff_checkpoints(one: tuple[Path, Manifest], other: tuple[Path, Manifest]) -> Difference:
    """The second against the first: config keys, tensors' names, and relative differences."""
    (_, old), (_, new) = one, other
    first, second = (StoredTensors(*checkpoint) for checkpoint in (one, other))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    shared = [
        name
        for name, tensor in old.tensors.items()
        if name in new.tensors and new.tensors[name].shape == tensor.shape
    ]
    for name in (name for name in shared if not name.startswith("rng/")):
        shape = old.tensors[name].shape
        a, b = (stored.read(name, start=0, shape=shape).double() for stored in (first, second))
        total = sums[_component(name)]
        total[0] += (b - a).square().sum().item()
        total[1] += a.square().sum().item()
    return Difference(
        changes=diff_values(old.config, new.config),
        only_first=sorted(old.tensors.keys() - set(shared)),
        only_second=sorted(new.tensors.keys() - set(shared)),
        relative={
            name: math.sqrt(difference / size) if size else math.inf if difference else 0.0
            for name, (difference, size) in sorted(sums.items())
        },
    )


def average_checkpoints(run_dir: Path, steps: Sequence[int], out: Path) -> Path:
    """A new run whose one checkpoint has the mean of the weights and routing biases.

    It can be evaluated, exported, written with, and started from (`init_from`).

    Raises:
        ValueError: There are fewer than two steps, one has no checkpoint or is damaged, they are
            of different models, or `out` is in use.
    """
    if len(set(steps)) < 2:
        raise ValueError(f"steps={list(steps)}: give at least two steps, such as steps=[100,200]")
    if (out / CONFIG_FILE).exists() or Checkpoints(out).steps():
        raise ValueError(f"out={out} holds a run already; choose another folder")
    found = [find_manifest(run_dir, step) for step in steps]
    for folder, manifest in found:
        verify_files(folder, manifest)
    shapes = [{n: t.shape for n, t in m.tensors.items() if _is_of_model(n)} for _, m in found]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"the checkpoints of steps {list(steps)} are of different models")
    stored = [StoredTensors(*checkpoint) for checkpoint in found]
    config = replace(read_config(run_dir / CONFIG_FILE, RunConfig), run_dir=str(out))
    path = write_checkpoint(
        out, list(_mean_runs(stored, shapes[0])), _describe_mean(run_dir, found[-1][1], config)
    )
    write_config(config, out / CONFIG_FILE)
    return path


def _mean_runs(stored: list[StoredTensors], shapes: dict[str, tuple[int, ...]]) -> Iterator[Run]:
    for name, shape in shapes.items():

        def read(name: str = name, shape: tuple[int, ...] = shape) -> Tensor:
            total = stored[0].read(name, start=0, shape=shape).double()
            for other in stored[1:]:
                total += other.read(name, start=0, shape=shape)
            return total / len(stored)

        yield Run(name, shape, 0, math.prod(shape), torch.float32, read)


def _describe_mean(run_dir: Path, last: Manifest, config: RunConfig) -> dict[str, Any]:
    return {
        "step": last.step,
        "tokens": last.tokens,
        "progress": last.progress,
        "parent": Parent(Origin.averaged, str(run_dir), last.step, last.hash),
        "tokenizer": last.tokenizer,
        "layout": {"ranks": 1},
        "versions": code_version(),
        "config": describe_config(config),
    }


def _examine(folder: Path, step: int, verify: CheckpointVerify) -> Health:
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return Health(step, None, num_bytes, str(error))
    try:
        verify_files(folder, manifest, verify=verify)
    except (ValueError, OSError) as error:
        return Health(step, manifest, num_bytes, str(error))
    return Health(step, manifest, num_bytes, "")


def _component(name: str) -> str:
    """`weight/layers.3.ffn.experts.up` is `weight/layers.ffn.experts.up`: all layers' together."""
    return LAYER.sub(lambda found: f"{found[1]}.", name)


def _is_of_model(name: str) -> bool:
    return name.startswith(("weight/", "buffer/"))
