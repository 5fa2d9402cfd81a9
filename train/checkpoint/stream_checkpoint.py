"""A checkpoint that no training writes: tensors come one at a time, computed or read."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.progress import open_progress
from train.checkpoint.checkpoints import PARTIAL, Checkpoints
from train.checkpoint.manifest import (
    Manifest,
    Part,
    Piece,
    StoredTensor,
    merge_runs,
    write_manifest,
)
from train.checkpoint.tensor_file import sync_folder
from train.checkpoint.tensor_stream import TensorSpec, cut_shards, write_stream

SHARD_BYTES = 8_000_000_000


class Run(NamedTuple):
    """A run of a logical tensor's flattened elements."""

    name: str
    shape: tuple[int, ...]  # of the whole logical tensor
    start: int
    numel: int
    dtype: torch.dtype
    read: Callable[[], Tensor]  # its values; any shape, any type

    @property
    def key(self) -> str:
        return f"{self.name}@{self.start}"


def write_checkpoint(
    run_dir: Path, runs: Sequence[Run], about: Mapping[str, Any], *, stage: str = "checkpoint"
) -> Path:
    """Write and publish the checkpoint of step `about["step"]`; its folder.

    Host memory holds one run at a time; progress is shown as `stage`.

    Raises:
        OSError: The disk is full or fails; no checkpoint has come to be.
    """
    final = Checkpoints(run_dir).path(about["step"])
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        parts = _write_parts(partial, runs, stage)
        files = {part.file: part.stored for part in parts}
        write_manifest(partial, Manifest(tensors=merge_runs(parts), files=files, **about))
        sync_folder(partial)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(final.parent)
    return final


def _write_parts(partial: Path, runs: Sequence[Run], stage: str) -> list[Part]:
    by_key = {run.key: run for run in runs}
    specs = [TensorSpec(run.key, run.dtype, (run.numel,)) for run in runs]
    parts = []
    total_bytes = sum(spec.num_bytes for spec in specs)
    with open_progress().stage(stage, total_bytes=total_bytes) as advance:
        for number, shard in enumerate(cut_shards(specs, shard_bytes=SHARD_BYTES)):
            file = f"part-{number:05}.safetensors"
            values = (by_key[spec.name].read().flatten().to(spec.dtype) for spec in shard)
            stored = write_stream(partial / file, shard, values, advance=advance)
            entries = []
            for run in (by_key[spec.name] for spec in shard):
                dtype = str(run.dtype).removeprefix("torch.")
                piece = Piece(file, run.start, run.numel)
                entries.append((run.name, StoredTensor(run.shape, dtype, [piece])))
            parts.append(Part(file, stored, entries))
    return parts
