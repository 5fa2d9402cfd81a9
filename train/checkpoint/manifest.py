"""A checkpoint's table of contents: which elements of which logical tensor lie in which file.

It also says where the checkpoint comes from and where the run stood, in JSON that a person can
read, and carries a hash of itself.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.atomic_file import read_json, write_json

FORMAT = 2
READABLE = (1, 2)  # format 1 has no hash of itself, no parent, and no hashes of headers
MANIFEST_FILE = "manifest.json"
UNREADABLE = (
    *(OSError, KeyError, TypeError, AttributeError),
    *(UnicodeDecodeError, json.JSONDecodeError),
)


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
    hash: str  # of all bytes
    header: str = ""  # hash of what stands before the tensors' bytes; empty in format 1


class Part(NamedTuple):
    """What one rank wrote: its file and the tensors' runs in it."""

    file: str
    stored: StoredFile
    runs: list[tuple[str, StoredTensor]]


class Origin(StrEnum):
    """What the run did with the checkpoint that it came from."""

    continued = "continued"
    init_from = "init_from"
    grown = "grown"
    averaged = "averaged"


class Parent(NamedTuple):
    """The checkpoint that this start of the run began from."""

    origin: Origin
    run_dir: str
    step: int
    hash: str  # its manifest's


class Measured(NamedTuple):
    """What an evaluation found."""

    step: int
    loss: float  # nats per token of the validation split


@dataclass(slots=True, kw_only=True)
class Manifest:
    format: int = FORMAT
    step: int
    tokens: int = 0  # seen: tokens that were predicted, over the whole run
    progress: dict[str, Any]  # the run's counters and its position in the data (`Progress`)
    schedule: dict[str, float] = field(default_factory=dict)  # rate and batch of the last step
    evaluation: Measured | None = None  # at this step; None where there was none
    loss: float | None = None  # training loss of the last step that was read
    meters: dict[str, float] = field(default_factory=dict)
    parent: Parent | None = None  # None: the run began from random weights, or was imported
    tokenizer: str  # fingerprint
    layout: dict[str, Any]  # ranks, and the whole parallel config
    versions: dict[str, str]  # of the packages, and the commit of the code where it is known
    config: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)  # key: [old, new], since the parent
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    hash: str = ""  # of everything above, whatever the white space; set when it is written


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
    """Write it, with its hash set."""
    manifest.hash = _hash_values(asdict(manifest))
    write_json(folder / MANIFEST_FILE, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: It is missing, damaged, edited or of a format that this version does not know.
    """
    path = folder / MANIFEST_FILE
    try:
        values = read_json(path)
        if values["format"] not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise ValueError(f"{path} has format {values['format']}, this version reads {known}")
        has_hash = values["format"] > 1 or "hash" in values
        if has_hash and values["hash"] != _hash_values(values):
            raise ValueError(f"{path} has been edited or damaged since it was written")
        values["tensors"] = {
            name: StoredTensor(tuple(shape), dtype, [Piece(*piece) for piece in pieces])
            for name, (shape, dtype, pieces) in values["tensors"].items()
        }
        values["files"] = {name: StoredFile(*stored) for name, stored in values["files"].items()}
        if values.get("parent") is not None:
            origin, *rest = values["parent"]
            values["parent"] = Parent(Origin(origin), *rest)
        if values.get("evaluation") is not None:
            values["evaluation"] = Measured(*values["evaluation"])
        return Manifest(**values)
    except UNREADABLE as error:
        raise ValueError(f"{path} is no manifest of a checkpoint: {error!r}") from error


def _hash_values(values: dict[str, Any]) -> str:
    """Of all values but the hash, in an order and spelling of its own."""
    rest = {key: value for key, value in values.items() if key != "hash"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
