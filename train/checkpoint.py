"""Checkpoints: logical tensors in safetensors files, and a manifest that says what is where.

A checkpoint knows nothing of ranks. Every tensor has a logical name and shape (a stack of
experts: all of them, by global index) and is stored as runs of its flattened elements, each
written by the rank that owns it. Any layout can therefore read what any other wrote. Nothing is
pickled: reading executes nothing.

    RUN/checkpoints/step-00000100/manifest.json            what, where, hashes, position, config
    RUN/checkpoints/step-00000100/rank-00000.safetensors
    RUN/checkpoints/step-00000150.partial/                 a save that was cut short: ignored
"""

import logging
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from train.manifest import (
    Fragment,
    Manifest,
    Part,
    Piece,
    StoredFile,
    StoredTensor,
    merge_runs,
    read_manifest,
    write_manifest,
)
from train.ranks import Ranks
from train.tensor_file import hash_tensors, sync_folder, write_tensors

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
PARTIAL = ".partial"


class OnError(StrEnum):
    """After a save has failed the last checkpoint is as it was; the run may go on or stop."""

    proceed = "proceed"
    stop = "stop"


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    #: Steps between checkpoints; there is always one at the end and at an interruption.
    every: int = 1000
    #: How many of the newest are kept.
    keep: int = 3
    #: What the run does when a save fails (a full disk): proceed without it, or stop.
    on_error: OnError = OnError.stop


def check_checkpoint(config: CheckpointConfig) -> None:
    """Refuse, with a ValueError, intervals that keep nothing."""
    for name in ("every", "keep"):
        if getattr(config, name) < 1:
            raise ValueError(f"checkpoint.{name}={getattr(config, name)} must be at least 1")


class SaveError(Exception):
    """A save failed on at least one rank; the checkpoints before it are intact."""


class Checkpoints:
    """The checkpoints of one run's folder."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        self.folder = run_dir / FOLDER
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        found = self.folder.glob("step-????????")
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def save(
        self, step: int, fragments: Iterable[Fragment], *, ranks: Ranks, about: Mapping[str, Any]
    ) -> None:
        """Write all ranks' fragments aside; rename once every byte is on disk.

        `about` holds the manifest's other fields (rank 0's count). All ranks return, or all
        raise.

        Raises:
            SaveError: A rank could not write; nothing is left of the attempt.
        """
        final = self.path(step)
        partial = final.with_name(final.name + PARTIAL)
        problem = part = None
        try:
            partial.mkdir(parents=True, exist_ok=True)
            part = _write_part(partial, ranks.rank, fragments)
        except OSError as error:
            problem = f"rank {ranks.rank}: {error}"
        reports: list[Any] = ranks.gather((part, problem))
        problems = [problem for _, problem in reports if problem]
        if ranks.is_first and not problems:
            try:
                _finish(partial, final, step, [part for part, _ in reports], about)
            except OSError as error:
                problems = [f"rank 0: {error}"]
        if any(ranks.gather(problems)):
            if ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise SaveError(
                f"the checkpoint of step {step} in {self.folder} could not be written: "
                f"{'; '.join(problems) or 'rank 0 failed'}; those before it are intact"
            )
        if ranks.is_first:
            self._remove_old(step)

    def find_newest(self, ranks: Ranks) -> Manifest | None:
        """The newest checkpoint whose files are all there and whole, or None if there is none.

        Every file is read and hashed once, each by one rank. A damaged checkpoint is named in a
        warning, and the one before it is tried.

        Raises:
            ValueError: There are checkpoints, but none is whole.
        """
        steps: list[Any] = ranks.gather(self.steps())
        for step in reversed(steps[0]):
            problem = None
            try:
                manifest = read_manifest(self.path(step))
                verify_files(self.path(step), manifest, share=(ranks.rank, ranks.count))
            except (ValueError, OSError) as error:
                problem = str(error)
            problems: list[Any] = [problem for problem in ranks.gather(problem) if problem]
            if not problems:
                return manifest
            log.warning("checkpoint of step %d is damaged: %s", step, "; ".join(problems))
            log.warning("going back to the checkpoint before it")
        if steps[0]:
            raise ValueError(
                f"no checkpoint in {self.folder} is whole; start anew with another run_dir, or "
                "restore one of the folders there"
            )
        return None

    def choose(self, ranks: Ranks, *, step: int | None) -> Manifest:
        """The checkpoint of that step; with None the newest that is whole.

        Raises:
            ValueError: There is no such checkpoint.
        """
        if step is None:
            manifest = self.find_newest(ranks)
            if manifest is None:
                raise ValueError(f"{self.folder} has no checkpoint yet; train the run first")
            return manifest
        if step not in self.steps():
            raise ValueError(
                f"step={step} has no checkpoint in {self.folder}; choose one of {self.steps()}"
            )
        return read_manifest(self.path(step))

    def _remove_old(self, saved_step: int) -> None:
        """Keep the newest up to the one just saved; those beyond it were found damaged."""
        for path in self.folder.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
        past = [step for step in self.steps() if step <= saved_step]
        damaged = [step for step in self.steps() if step > saved_step]
        for step in past[: -self.keep] + damaged:
            doomed = self.path(step).with_suffix(PARTIAL)
            try:  # renamed first: a folder half removed must not look complete
                self.path(step).rename(doomed)
            except OSError as error:
                log.warning("%s can't be removed: %s", self.path(step), error)
            shutil.rmtree(doomed, ignore_errors=True)


def load(folder: Path, manifest: Manifest, fragments: Iterable[Fragment]) -> None:
    """Fill the fragments' storage from the checkpoint, whatever layout wrote it.

    Raises:
        ValueError: A fragment's tensor is missing, of another shape, or a file can't be read.
    """
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for fragment in fragments:
            stored = _find_tensor(manifest, fragment)
            for piece in stored.pieces:
                begin = max(piece.start, fragment.start)
                end = min(piece.start + piece.numel, fragment.start + fragment.data.numel())
                if begin >= end:
                    continue
                if piece.file not in files:
                    files[piece.file] = stack.enter_context(_open(folder / piece.file))
                run = files[piece.file].get_slice(f"{fragment.name}@{piece.start}")
                values = run[begin - piece.start : end - piece.start]
                fragment.data[begin - fragment.start : end - fragment.start].copy_(values)


def check_coverage(manifest: Manifest, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse, with a ValueError, a checkpoint of another model: both must name the same tensors.

    Of the kinds of tensors (`weight/`, `buffer/`, ...) only those that are wanted count.
    """
    kinds = {name.split("/")[0] for name in wanted}
    stored = {
        name: tensor.shape
        for name, tensor in manifest.tensors.items()
        if name.split("/")[0] in kinds
    }
    where = f"step {manifest.step}'s checkpoint"
    for name in sorted(stored.keys() | wanted.keys()):
        if name not in stored:
            raise ValueError(f"{where} lacks {name}, which this model has")
        if name not in wanted:
            raise ValueError(f"{where} has {name}, which this model lacks")
        if stored[name] != wanted[name]:
            raise ValueError(
                f"{name} has shape {list(stored[name])} in {where}, but "
                f"{list(wanted[name])} in this model; use the model config of that run"
            )


def verify_files(folder: Path, manifest: Manifest, *, share: tuple[int, int] = (0, 1)) -> None:
    """Compare size and hash of the checkpoint's files, or of the i-th of n shares of them.

    Raises:
        ValueError: A file is missing, cut short or changed.
    """
    index, count = share
    for name, stored in list(manifest.files.items())[index::count]:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != stored.num_bytes:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes instead of {stored.num_bytes}"
            )
        if hash_tensors(path) != stored:
            raise ValueError(f"{path} has changed since it was written")


def _write_part(folder: Path, rank: int, fragments: Iterable[Fragment]) -> Part:
    file = f"rank-{rank:05}.safetensors"
    owned = list(fragments)
    stored = write_tensors(folder / file, {f"{f.name}@{f.start}": f.data for f in owned})
    runs = [
        (
            f.name,
            StoredTensor(
                f.shape,
                str(f.data.dtype).removeprefix("torch."),
                [Piece(file, f.start, f.data.numel())],
            ),
        )
        for f in owned
    ]
    return Part(file, stored, runs)


def _finish(
    partial: Path, final: Path, step: int, parts: list[Part], about: Mapping[str, Any]
) -> None:
    files: dict[str, StoredFile] = {part.file: part.stored for part in parts}
    write_manifest(partial, Manifest(step=step, tensors=merge_runs(parts), files=files, **about))
    sync_folder(partial)
    if final.exists():  # an earlier attempt at the same step, damaged or it would have been used
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)


def _find_tensor(manifest: Manifest, fragment: Fragment) -> StoredTensor:
    stored = manifest.tensors.get(fragment.name)
    if stored is None:
        raise ValueError(f"step {manifest.step}'s checkpoint lacks {fragment.name}")
    if stored.shape != fragment.shape:
        raise ValueError(
            f"{fragment.name} has shape {list(stored.shape)} in step {manifest.step}'s "
            f"checkpoint, but {list(fragment.shape)} in this model"
        )
    return stored


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
