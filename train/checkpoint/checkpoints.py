"""Checkpoints: logical tensors in safetensors files, and a manifest that says what is where.

A checkpoint knows nothing of ranks. Every tensor has a logical name and shape (a stack of
experts: all of them, by global index) and is stored as runs of its flattened elements, each
written by the rank that owns it. Any layout can therefore read what any other wrote. Nothing is
pickled: reading executes nothing.

    RUN/checkpoints/step-00000100/manifest.json            what, where, hashes, position, config
    RUN/checkpoints/step-00000100/rank-00000.safetensors
    RUN/checkpoints/step-00000150.partial/                 a save that was cut short: ignored
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from train.checkpoint.integrity import CheckpointVerify, verify_files
from train.checkpoint.manifest import (
    Fragment,
    Manifest,
    Part,
    Piece,
    StoredTensor,
    merge_runs,
    read_manifest,
    write_manifest,
)
from train.checkpoint.retention import Retention, Saved, choose_doomed
from train.checkpoint.tensor_file import sync_folder, write_tensors
from train.checkpoint.tensor_stream import TensorFile
from train.ranks import Ranks

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
PARTIAL = ".partial"
# Parts of the config that say where and how a run happens, not which run it is.
NO_IDENTITY = {"run_dir", "launch", "logging"}


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
    #: Steps whose multiples are kept for good, whatever their age; null keeps none for that.
    keep_every: int | None = None
    #: How many of those with the lowest validation loss are kept; only steps that were evaluated
    #: count (`evaluation.every` should divide `checkpoint.every`).
    keep_best: int = 0
    #: Whether a save only stalls training for a copy into host memory, and is written beside it.
    #: The copy takes as much host memory as the rank's share of the state.
    asynchronous: bool = True
    #: What the run does when a save fails (a full disk): proceed without it, or stop.
    on_error: OnError = OnError.stop
    #: What is checked before a checkpoint is used: full (hash of every byte) or fast (sizes and
    #: headers).
    verify: CheckpointVerify = CheckpointVerify.full
    #: Patterns (`exp_avg*/mtp.*`) of tensors that a checkpoint may lack; they start as new.
    allow_missing: list[str] = field(default_factory=list)
    #: Patterns of tensors that a checkpoint may have though the model lacks them; they are left.
    allow_surplus: list[str] = field(default_factory=list)


def check_checkpoint(config: CheckpointConfig) -> None:
    """Refuse, with a ValueError, intervals that keep nothing."""
    for name in ("every", "keep", "keep_every"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"checkpoint.{name}={value} must be at least 1")
    if config.keep_best < 0:
        raise ValueError(f"checkpoint.keep_best={config.keep_best} must not be negative")


class SaveError(Exception):
    """A save failed on at least one rank; the checkpoints before it are intact."""

    def __init__(self, message: str, *, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = list(ranks)  # those that could not write


class Written(NamedTuple):
    """A finished save."""

    step: int
    path: Path
    num_bytes: int  # of all ranks' files
    hash: str  # the manifest's


class Checkpoints:
    """The checkpoints of one run's folder."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int = 1,
        keep_every: int | None = None,
        keep_best: int = 0,
        verify: CheckpointVerify = CheckpointVerify.full,
    ) -> None:
        self.folder = run_dir / FOLDER
        self.retention = Retention(newest=keep, every=keep_every, best=keep_best)
        self.verify = verify

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        found = self.folder.glob("step-????????")
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def save(
        self, step: int, fragments: Iterable[Fragment], *, ranks: Ranks, about: Mapping[str, Any]
    ) -> Written:
        """Write all ranks' fragments aside; rename once every byte is on disk.

        `about` holds the manifest's other fields (rank 0's count). All ranks return the same, or
        all raise.

        Raises:
            SaveError: A rank could not write; nothing is left of the attempt.
        """
        final = self.path(step)
        partial = final.with_name(final.name + PARTIAL)
        if ranks.is_first:  # a killed attempt of more ranks may have left files
            shutil.rmtree(partial, ignore_errors=True)
        ranks.wait()
        problem, parts = None, []
        try:
            partial.mkdir(parents=True, exist_ok=True)
            parts = _write_parts(partial, ranks.rank, fragments, _identify(step, about["config"]))
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            problem = f"rank {ranks.rank}: {error}"
        reports: list[Any] = ranks.gather((parts, problem))
        problems = [problem for _, problem in reports if problem]
        written = None
        if ranks.is_first and not problems:
            try:
                all_parts = [part for parts, _ in reports for part in parts]
                written = _finish(partial, final, step, all_parts, about)
            except Exception as error:
                problems = [f"rank 0: {error}"]
        verdicts: list[Any] = ranks.gather((written, problems))
        written, problems = verdicts[0]
        if written is None:
            if ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise SaveError(
                f"the checkpoint of step {step} in {self.folder} could not be written: "
                f"{'; '.join(problems)}; those before it are intact",
                ranks=[rank for rank, (_, problem) in enumerate(reports) if problem],
            )
        if ranks.is_first:
            self._remove_old(step)
        return written

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
                share = (ranks.rank, ranks.count)
                verify_files(self.path(step), manifest, verify=self.verify, share=share)
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
        """Apply the rule up to the one just saved; those beyond it were found damaged."""
        for path in self.folder.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
        past = [self._describe(step) for step in self.steps() if step <= saved_step]
        damaged = [step for step in self.steps() if step > saved_step]
        for step in choose_doomed(past, self.retention) + damaged:
            doomed = self.path(step).with_suffix(PARTIAL)
            try:  # renamed first: a folder half removed must not look complete
                self.path(step).rename(doomed)
            except OSError as error:
                log.warning("%s can't be removed: %s", self.path(step), error)
            shutil.rmtree(doomed, ignore_errors=True)

    def _describe(self, step: int) -> Saved:
        if not self.retention.best:
            return Saved(step, None)
        try:
            evaluation = read_manifest(self.path(step)).evaluation
        except ValueError:  # damaged: it goes when its age says so
            return Saved(step, None)
        return Saved(step, evaluation.loss if evaluation is not None else None)


def load(folder: Path, manifest: Manifest, fragments: Iterable[Fragment]) -> None:
    """Fill the fragments' storage from the checkpoint, whatever layout wrote it.

    Host memory holds one block of a file at a time.

    Raises:
        ValueError: A fragment's tensor is missing, of another shape, or a file can't be read.
    """
    files: dict[str, TensorFile] = {}
    try:
        for fragment in fragments:
            stored = _find_tensor(manifest, fragment)
            for piece in stored.pieces:
                begin = max(piece.start, fragment.start)
                end = min(piece.start + piece.numel, fragment.start + fragment.data.numel())
                if begin >= end:
                    continue
                if piece.file not in files:
                    files[piece.file] = _open(folder / piece.file)
                files[piece.file].read_into(
                    fragment.data[begin - fragment.start : end - fragment.start],
                    f"{fragment.name}@{piece.start}",
                    start=begin - piece.start,
                )
    finally:
        for file in files.values():
            file.close()


def _write_parts(
    folder: Path, rank: int, fragments: Iterable[Fragment], identity: Mapping[str, str]
) -> list[Part]:
    """One file for the rank's share of the state, and one of its own for that of the average."""
    parts = []
    by_file = sorted(fragments, key=_kind_of_file)
    for kind, owned_here in groupby(by_file, key=_kind_of_file):
        owned = list(owned_here)
        file = f"{kind}-{rank:05}.safetensors"
        tensors = {f"{f.name}@{f.start}": f.data for f in owned}
        stored = write_tensors(folder / file, tensors, about=identity)
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
        parts.append(Part(file, stored, runs))
    return parts


def _kind_of_file(fragment: Fragment) -> str:
    return "ema" if fragment.name.startswith("ema/") else "rank"


def _identify(step: int, config: Mapping[str, Any]) -> dict[str, str]:
    """What tells a file of this run and step from one of the same shape of another."""
    rest = {key: value for key, value in config.items() if key not in NO_IDENTITY}
    text = json.dumps(rest, sort_keys=True, default=str)
    return {"run": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), "step": str(step)}


def _finish(
    partial: Path, final: Path, step: int, parts: list[Part], about: Mapping[str, Any]
) -> Written:
    files = {part.file: part.stored for part in parts}
    manifest = Manifest(step=step, tensors=merge_runs(parts), files=files, **about)
    write_manifest(partial, manifest)
    sync_folder(partial)
    if final.exists():  # an earlier attempt at the same step, damaged or it would have been used
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)
    num_bytes = sum(stored.num_bytes for stored in files.values())
    return Written(step, final, num_bytes, manifest.hash)


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


def _open(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
