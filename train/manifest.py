"""A checkpoint's table of contents: which elements of which logical tensor lie in which file."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.atomic_file import read_json, write_json

FORMAT = 1
MANIFEST_FILE = "manifest.json"


class Fragment(NamedTuple):
    """A run of a logical tensor's flattened elements that this rank owns, as live storage."""

    name: str
    shape: tuple[int, ...]  # of the whole logical tensor
    start: int  # place of the first element
    data: Tensor  # 1-D


class Piece(NamedTuple):
    """Such a run in a file, where its key is `name@start`."""

    file: str
    start: int
    numel: int


class StoredTensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    pieces: list[Piece]  # in order, without gaps


class StoredFile(NamedTuple):
    num_bytes: int
    hash: str


class Part(NamedTuple):
    """What one rank wrote: its file and the tensors' runs in it."""

    file: str
    stored: StoredFile
    runs: list[tuple[str, StoredTensor]]


@dataclass(slots=True, kw_only=True)
class Manifest:
    format: int = FORMAT
    step: int
    progress: dict[str, int]  # the run's counters, data position included
    tokenizer: str  # fingerprint
    layout: dict[str, int]
    versions: dict[str, str]
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]


def merge_runs(parts: Iterable[Part]) -> dict[str, StoredTensor]:
    """The logical tensors that all ranks' runs make up together."""
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        for name, run in part.runs:
            tensors.setdefault(name, run._replace(pieces=[])).pieces.extend(run.pieces)
    for name, stored in tensors.items():
        stored.pieces.sort(key=lambda piece: piece.start)
        end = 0
        for piece in stored.pieces:
            assert piece.start == end, f"{name}: elements {end} to {piece.start} have no owner"
            end += piece.numel
        assert end == torch.Size(stored.shape).numel(), f"{name}: elements from {end} on have none"
    return tensors


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST_FILE, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: It is missing, damaged or of a format that this version does not know.
    """
    path = folder / MANIFEST_FILE
    try:
        values = read_json(path)
        if values["format"] != FORMAT:
            raise ValueError(f"{path} has format {values['format']}, this version reads {FORMAT}")
        values["tensors"] = {
            name: StoredTensor(tuple(shape), dtype, [Piece(*piece) for piece in pieces])
            for name, (shape, dtype, pieces) in values["tensors"].items()
        }
        values["files"] = {name: StoredFile(*stored) for name, stored in values["files"].items()}
        return Manifest(**values)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no manifest of a checkpoint: {error!r}") from error
