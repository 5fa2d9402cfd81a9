"""A run becomes a larger (or smaller) one: its newest checkpoint with other expert counts or depth.

Everything is streamed: one tensor, or one expert of a stack, is in memory at a time, and one block
while the change of the function is measured.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import Manifest, Origin, Parent
from train.checkpoint.stored_tensors import StoredTensors, open_checkpoint
from train.checkpoint.stream_checkpoint import Run, write_checkpoint
from train.code_version import code_version
from train.config import CONFIG_FILE, RunConfig, describe_config
from train.config_diff import Change, diff_values
from train.grow.config import GrowChoices, Growth, check_choices, check_growth
from train.grow.measure import Difference, Fill, compare, run_model
from train.grow.tensors import BUFFER, GrownTensors, Place
from train.hub.gate import real_tokens

RNG = "rng/"


class Grown(NamedTuple):
    step: int
    path: Path
    changes: list[Change]
    parameters: int


def grow(
    source: Path,
    old: RunConfig,
    new: RunConfig,
    choices: GrowChoices,
    *,
    report: Callable[[Difference], None],
    into: Path | None = None,
) -> Grown:
    """Write the grown checkpoint into the new run's folder, as the one to continue from.

    `report` is told the change of the function before anything is written. `into` is a folder other
    than the new run's to write into.

    Raises:
        ValueError: The change can't be made, is larger than allowed, or the folder is in use.
    """
    into = Path(new.run_dir) if into is None else into
    changes = check(old, new, choices, into=into)
    stored = open_checkpoint(source, step=None)
    growth = Growth(old=old.model, new=new.model, seed=old.seed, choices=choices)
    tokens = real_tokens(old.data, sequences=choices.sequences)
    before = run_model(old.model, fill_from(stored), tokens)

    def use(prefix: str) -> tuple[Tensor, Tensor]:
        load = next(load for name, load in before.load.items() if prefix.startswith(name))
        name = f"weight/{prefix}ffn.router.weight"
        return load, stored.read(name, start=0, shape=stored.manifest.tensors[name].shape)

    tensors = GrownTensors(growth, stored, use=use)
    difference = compare(before, run_model(new.model, fill_from(tensors), tokens))
    report(difference)
    if choices.max_error is not None and not difference.relative <= choices.max_error:
        raise ValueError(
            f"the logits change by {difference.relative:.1e}, more than grow.max_error="
            f"{choices.max_error}; nothing was written"
        )
    path = write_checkpoint(into, list(plan_runs(tensors, stored)), _describe(source, stored, new))
    parameters = sum(math.prod(shape) for shape in tensors.shapes.values())
    return Grown(stored.manifest.step, path, changes, parameters)


def check(
    old: RunConfig, new: RunConfig, choices: GrowChoices, *, into: Path | None = None
) -> list[Change]:
    """What grows; refuses, with a ValueError, what can't."""
    check_choices(choices)
    values = describe_config(old), describe_config(new)
    changes = check_growth(values[0]["model"], values[1]["model"])
    if not changes:
        raise ValueError(
            "nothing grows: give another model.moe.num_experts, model.moe.top_k, "
            "model.num_layers or the like"
        )
    run_dir = Path(new.run_dir) if into is None else into
    if Checkpoints(run_dir).steps() or (run_dir / CONFIG_FILE).exists():
        raise ValueError(f"run_dir={run_dir} holds a run already; choose another run_dir")
    return changes


def fill_from(source: StoredTensors | GrownTensors) -> Fill:
    """Fills a model's tensors from a checkpoint, or from one that is being grown."""

    def fill(name: str, tensor: Tensor) -> None:
        shape = tuple(tensor.shape)
        if isinstance(source, StoredTensors):
            kind = "weight/" if f"weight/{name}" in source.manifest.tensors else BUFFER
            tensor.copy_(source.read(kind + name, start=0, shape=shape))
        elif name in source.buffers:
            tensor.copy_(source.read_buffer(name))
        else:
            for place in source.places_of(name):
                out = tensor if place.expert is None else tensor[place.expert]
                out.copy_(source.read("weight/", place))

    return fill


def plan_runs(tensors: GrownTensors, stored: StoredTensors) -> Iterator[Run]:
    """All that the grown checkpoint holds: each kind of tensor that the old one has."""
    kinds = {name.split("/")[0] + "/" for name in stored.manifest.tensors} - {BUFFER, RNG}
    for kind in sorted(kinds, reverse=True):
        dtype = _dtype(stored.manifest, kind)
        for place in tensors.places():
            yield Run(
                kind + place.name,
                tensors.shapes[place.name],
                place.start,
                math.prod(place.shape),
                dtype,
                _reader(tensors, kind, place),
            )
    for name, shape in tensors.buffers.items():
        yield Run(
            BUFFER + name, shape, 0, math.prod(shape), torch.float32, _buffer_reader(tensors, name)
        )


def _reader(tensors: GrownTensors, kind: str, place: Place) -> Callable[[], Tensor]:
    return lambda: tensors.read(kind, place)


def _buffer_reader(tensors: GrownTensors, name: str) -> Callable[[], Tensor]:
    return lambda: tensors.read_buffer(name)


def _dtype(manifest: Manifest, kind: str) -> torch.dtype:
    """The one type that all tensors of a kind have.

    Raises:
        ValueError: The kind's tensors are no images of the weights (packed moments).
    """
    for name, tensor in manifest.tensors.items():
        weight = manifest.tensors.get("weight/" + name.removeprefix(kind))
        if name.startswith(kind) and (weight is None or weight.shape != tensor.shape):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, which is not its weight's: moments "
                "of this kind can't be grown; continue the run for a step with optimizer=adamw"
            )
    found = {tensor.dtype for name, tensor in manifest.tensors.items() if name.startswith(kind)}
    dtype = getattr(torch, found.pop())
    assert isinstance(dtype, torch.dtype), dtype
    return dtype


def _describe(source: Path, stored: StoredTensors, new: RunConfig) -> dict[str, object]:
    manifest = stored.manifest
    values = describe_config(new)
    changes = diff_values(manifest.config, values)
    return {
        "step": manifest.step,
        "tokens": manifest.tokens,
        "progress": manifest.progress,
        "schedule": manifest.schedule,
        "loss": manifest.loss,
        "meters": manifest.meters,
        "parent": Parent(Origin.grown, str(source), manifest.step, manifest.hash),
        "tokenizer": manifest.tokenizer,
        "layout": {"ranks": 1},
        "versions": code_version(),
        "config": values,
        "changes": {change.key: [change.old, change.new] for change in changes},
    }
