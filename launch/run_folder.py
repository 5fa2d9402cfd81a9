"""A run's folder before the ranks start: whose run it holds, and the config they will read."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf

from launch.settings.config import LaunchedRun
from model.moe import MoEConfig
from model.router import RouterConfig
from train.checkpoint.checkpoints import FOLDER
from train.config import CONFIG_FILE, RunConfig, describe_config, read_config, write_config
from train.config_diff import Change, diff_values
from train.grow.config import is_growable

# A continuation keeps these; anything else may change from one start to the next.
FIXED = ("model", "data", "seed", "init_from")
# Where the corpus lies, how it is checked, and how it is read: the position in the data knows.
MOVABLE = (
    *("data.folder", "data.processes", "data.verify", "data.retry", "data.cache_bytes"),
    *("data.seq_len", "data.packing", "data.fim", "data.mask_documents", "data.reset_positions"),
    *("data.sources", "data.stages"),
)
Launched = TypeVar("Launched", bound=LaunchedRun)
SECTIONS = {name for name, kind in get_type_hints(LaunchedRun).items() if is_dataclass(kind)}


def take_up(config: LaunchedRun, overrides: list[str]) -> LaunchedRun:
    """The config to start with: the composed one, or that of the run which the folder holds.

    A run that has begun goes on as it was last started (`thrifty train run_dir=RUN` is enough),
    but for the groups whose option the command line chooses (an experiment chooses all), with the
    command line's values on top.

    Raises:
        ValueError: The folder's config can't be read.
    """
    path = Path(config.run_dir) / CONFIG_FILE
    chosen = {override.lstrip("+~").split("=")[0] for override in overrides}
    if "experiment" in chosen or not has_begun(path.parent):
        return config
    return apply_overrides(read_config(path, LaunchedRun), config, overrides)


def apply_overrides(kept: Launched, composed: Launched, overrides: list[str]) -> Launched:
    """`kept` with the command line's values, and with `composed`'s groups where it chooses one."""
    chosen = {override.lstrip("+~").split("=")[0] for override in overrides}
    base = replace(kept, **{name: getattr(composed, name) for name in SECTIONS & chosen})
    values = [override for override in overrides if override.split("=")[0] not in SECTIONS]
    structured = OmegaConf.structured(base)
    if base.model.moe is None and any(value.startswith("model.moe.") for value in values):
        structured.model.moe = MoEConfig
        structured.model.moe.router = RouterConfig()
    merged = OmegaConf.merge(structured, OmegaConf.from_dotlist(values))
    settled = OmegaConf.to_object(merged)
    assert isinstance(settled, type(kept))
    return settled


def has_begun(run_dir: Path) -> bool:
    """Whether the folder holds a config and a checkpoint: a run that can be continued."""
    return (run_dir / CONFIG_FILE).is_file() and any((run_dir / FOLDER).glob("step-*"))


def prepare_folder(config: LaunchedRun) -> list[Change]:
    """What changed since the folder's last start; afterwards it holds the new config.

    Raises:
        ValueError: The folder's run has other settings than a continuation may change.
    """
    run_dir = Path(config.run_dir)
    path = run_dir / CONFIG_FILE
    changes = []
    if has_begun(run_dir):
        changes = compare(read_config(path, LaunchedRun), config)
        refuse_fixed(run_dir, changes)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, path)
    return changes


def is_movable(key: str) -> bool:
    """Whether a key of a fixed section may change all the same."""
    return any(key == name or key.startswith(f"{name}.") for name in MOVABLE)


def refuse_fixed(run_dir: Path, changes: list[Change], *, but: str | None = None) -> None:
    """Refuse, with a ValueError, changes that a continuation can't make."""
    refused = [
        change
        for change in changes
        if change.key.split(".")[0] in FIXED
        and change.key.split(".")[0] != but
        and not is_movable(change.key)
    ]
    if not refused:
        return
    listed = "; ".join(map(str, refused))
    hint = ""
    if is_growable(refused):
        settings = " ".join(f"{change.key}={change.new}" for change in refused)
        hint = (
            f"; thrifty grow from={run_dir} run_dir=NEW {settings} makes a new run of it, and "
            "grow.on_resume=true beside these settings lets it grow in its own folder"
        )
    raise ValueError(
        f"run_dir={run_dir} holds a run with other settings ({listed}); give these the old values "
        f"to continue it, or another run_dir to start a new run{hint}"
    )


def compare(old: RunConfig, new: RunConfig) -> list[Change]:
    """Keys with different values, the folder itself excepted, in the order of the schema."""
    changes = diff_values(describe_config(old), describe_config(new))
    return [change for change in changes if change.key != "run_dir"]


def newest_run(folder: Path = Path("runs")) -> str:
    """The run below the folder (or below a sweep there) that wrote a checkpoint last.

    Raises:
        ValueError: There is none.
    """
    found = [*folder.glob("*/checkpoints"), *folder.glob("*/*/checkpoints")]
    if not found:
        raise ValueError(f"run_dir is not given, and {folder}/ holds no run; give run_dir=FOLDER")
    return str(max(found, key=lambda path: path.stat().st_mtime).parent)


def default_to_newest(values: DictConfig, *, key: str = "run_dir") -> None:
    """Fill in the newest run where the command line names none.

    Raises:
        ValueError: There is none.
    """
    if OmegaConf.is_missing(values, key):
        values[key] = newest_run()


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
