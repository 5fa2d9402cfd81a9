"""Whether a checkpoint's files are those that were written.

Fast: their sizes, and the hash of each file's header (names, places and whose file it is). Full:
the hash of every byte. The manifest's own hash is checked in either mode, where it is read.
"""

from enum import StrEnum
from pathlib import Path

from train.checkpoint.manifest import Manifest
from train.checkpoint.tensor_file import hash_header, hash_tensors

TENSOR_FILES = "*.safetensors"


class CheckpointVerify(StrEnum):
    fast = "fast"
    full = "full"


def verify_files(
    folder: Path,
    manifest: Manifest,
    *,
    verify: CheckpointVerify = CheckpointVerify.full,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Check the checkpoint's files, or the i-th of n shares of them.

    Raises:
        ValueError: A file is missing, cut short, changed, or another's; names it.
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
        if stored.header and hash_header(path) != stored.header:
            raise ValueError(f"{path} is not this checkpoint's file, or its header has changed")
        if verify is CheckpointVerify.full and hash_tensors(path).hash != stored.hash:
            raise ValueError(f"{path} has changed since it was written")
    strangers = {path.name for path in folder.glob(TENSOR_FILES)} - manifest.files.keys()
    if strangers:
        raise ValueError(f"{folder} holds {min(strangers)}, which this checkpoint has not written")
