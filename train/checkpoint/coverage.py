"""Whether a checkpoint has the tensors that a run needs, and no others."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from train.checkpoint.manifest import Manifest

Shapes = Mapping[str, tuple[int, ...]]


def check_coverage(
    manifest: Manifest,
    wanted: Shapes,
    *,
    allow_missing: Collection[str] = (),
    allow_surplus: Collection[str] = (),
) -> list[str]:
    """The names that the checkpoint lacks, each of which a pattern of `allow_missing` names.

    Of the kinds of tensors (`weight/`, `buffer/`, ...) only those that are wanted count.

    Raises:
        ValueError: A tensor is missing, surplus or of another shape; names it.
    """
    kinds = {name.split("/")[0] for name in wanted}
    stored = {
        name: tensor.shape
        for name, tensor in manifest.tensors.items()
        if name.split("/")[0] in kinds
    }
    where = f"step {manifest.step}'s checkpoint"
    missing = []
    for name in sorted(stored.keys() | wanted.keys()):
        if name not in stored:
            if not matches(name, allow_missing):
                raise ValueError(
                    f"{where} lacks {name}, which this model has; to start it from its initial "
                    f"value, name it in checkpoint.allow_missing"
                )
            missing.append(name)
        elif name not in wanted:
            if not matches(name, allow_surplus):
                raise ValueError(
                    f"{where} has {name}, which this model lacks; to leave it, name it in "
                    "checkpoint.allow_surplus"
                )
        elif stored[name] != wanted[name]:
            raise ValueError(
                f"{name} has shape {list(stored[name])} in {where}, but "
                f"{list(wanted[name])} in this model; use the model config of that run, or let "
                "`thrifty grow` change the checkpoint"
            )
    return missing


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether one of the patterns (as in a shell) names it."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
