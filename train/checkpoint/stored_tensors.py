"""A checkpoint's logical tensors, any part of any of them, one at a time in host memory."""

import math
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.manifest import Manifest
from train.checkpoint.tensor_stream import TensorFile
from train.ema import Weights, check_average, stored_name
from train.ranks import alone

BLOCK = 1 << 22  # elements read at a time


class StoredTensors:
    """Whatever layout wrote the checkpoint, a tensor is read as if it lay in one piece.

    With `weights=ema` the average's values come back under the weights' names.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, weights: Weights = Weights.trained
    ) -> None:
        check_average(manifest, weights)
        self.manifest = manifest
        self._folder = folder
        self._weights = weights
        self._files: dict[str, TensorFile] = {}

    def read(self, name: str, *, start: int, shape: tuple[int, ...]) -> Tensor:
        """The elements from `start` on that fill `shape`, in fp32.

        Raises:
            ValueError: The checkpoint has no such elements: it is of another model.
        """
        name = stored_name(name, self._weights)
        stored = self.manifest.tensors.get(name)
        flat = torch.empty(math.prod(shape))
        stop = start + flat.numel()
        if stored is None or stop > math.prod(stored.shape):
            found = f"shape {list(stored.shape)}" if stored is not None else "no such tensor"
            raise ValueError(
                f"step {self.manifest.step}'s checkpoint has {found} for {name}, but the run's "
                f"config asks for elements {start} to {stop}"
            )
        for piece in stored.pieces:
            begin = max(piece.start, start)
            end = min(piece.start + piece.numel, stop)
            for place in range(begin, end, BLOCK):  # the whole run at once would double the memory
                values = self._open(piece.file).read(
                    f"{name}@{piece.start}",
                    start=place - piece.start,
                    stop=min(place + BLOCK, end) - piece.start,
                )
                flat[place - start : place - start + len(values)] = values
        return flat.view(shape)

    def _open(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self._folder / name)
        return self._files[name]


def open_checkpoint(
    run_dir: Path, *, step: int | None, weights: Weights = Weights.trained
) -> StoredTensors:
    """The run's checkpoint of that step; with None the newest that is whole.

    Raises:
        ValueError: There is no such checkpoint, or no average in it that is asked for.
    """
    checkpoints = Checkpoints(run_dir, keep=1)  # nothing is saved, so nothing goes
    manifest = checkpoints.choose(alone(), step=step)
    return StoredTensors(checkpoints.path(manifest.step), manifest, weights=weights)
