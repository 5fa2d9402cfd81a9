"""A run's folder before the ranks start: whose run it holds, and the config they will read."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from train.checkpoint import FOLDER
from train.config import CONFIG_FILE, RunConfig, read_config, write_config

# A continuation keeps these; anything else may change from one start to the next.
FIXED = ("model", "data", "seed", "init_from")
# Where the corpus lies and how it is checked, not what it is.
MOVABLE = ("data.folder", "data.processes", "data.verify")


class Change(NamedTuple):
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def prepare_folder(config: RunConfig) -> list[Change]:
    """What changed since the folder's last start; afterwards it holds the new config.

    Raises:
        ValueError: The folder's run has other settings than a continuation may change.
    """
    run_dir = Path(config.run_dir)
    run = RunConfig(**{field.name: getattr(config, field.name) for field in fields(RunConfig)})
    path = run_dir / CONFIG_FILE
    changes = []
    has_begun = any((run_dir / FOLDER).glob("step-*"))
    if path.exists() and has_begun:
        changes = compare(read_config(path, RunConfig), run)
        refused = [
            change
            for change in changes
            if change.key.split(".")[0] in FIXED and change.key not in MOVABLE
        ]
        if refused:
            listed = "; ".join(map(str, refused))
            raise ValueError(
                f"run_dir={run_dir} holds a run with other settings ({listed}); give these the "
                "old values to continue it, or another run_dir to start a new run"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(run, path)
    return changes


def compare(old: RunConfig, new: RunConfig) -> list[Change]:
    """Keys with different values, the folder itself excepted, in the order of the schema."""
    old_values, new_values = (
        dict(_leaves(OmegaConf.to_container(OmegaConf.structured(config)))) for config in (old, new)
    )
    keys = [key for key in {**old_values, **new_values} if key != "run_dir"]
    return [
        Change(key, old_values.get(key), new_values.get(key))
        for key in keys
        if old_values.get(key) != new_values.get(key)
    ]


def newest_run(folder: Path = Path("runs")) -> str:
    """The run below the folder (or below a sweep there) that wrote a checkpoint last.

    Raises:
        ValueError: There is none.
    """
    found = [*folder.glob("*/checkpoints"), *folder.glob("*/*/checkpoints")]
    if not found:
        raise ValueError(f"run_dir is not given, and {folder}/ holds no run; give run_dir=FOLDER")
    return str(max(found, key=lambda path: path.stat().st_mtime).parent)


@contextmanager
def hold_folder(run_dir: Path) -> Iterator[None]:
    """Keep a second start out of the folder for as long as this one lasts.

    Raises:
        ValueError: Another process trains in the folder, or it can't be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise ValueError(
            f"run_dir={run_dir} can't be written ({error.strerror}); choose another folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"run_dir={run_dir}: another process trains in it; wait for it, or choose "
                "another run_dir"
            ) from error
        yield


def _leaves(values: Any, *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
