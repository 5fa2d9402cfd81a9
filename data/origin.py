"""What a prepared corpus was made from, so that a change of config or input is noticed."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data.atomic_file import hash_file, read_json, write_json
from data.config import Damaged, DataConfig, Verify, count_workers
from data.corpus import find_sources

FILE = "origin.json"
# What these settings say is said by the list of sources, or matters only when reading.
NOT_COMPARED = {
    *("folder", "seq_len", "processes", "verify", "mask_documents", "reset_positions"),
    *("packing", "fim", "retry", "cache_bytes", "paths", "streaming", "tokenizer"),
}


class Source(NamedTuple):
    """A file that the corpus is read from; without a hash only the size is compared."""

    path: str
    num_bytes: int
    sha256: str | None


class Origin(NamedTuple):
    """Settings and sources that decide every byte of a prepared corpus."""

    settings: dict[str, Any]
    sources: list[Source]


def describe_origin(config: DataConfig, *, verify: Verify) -> Origin:
    """The origin of the corpus as config and input files are now; `full` hashes the files."""
    values = dataclasses.asdict(config)
    settings = {key: value for key, value in values.items() if key not in NOT_COMPARED}
    # What changes nothing unless it is asked for is noted only then: older corpora lack it.
    if not config.select.is_asked_for:
        del settings["select"]
    if settings.get("damaged") == Damaged.refuse:
        del settings["damaged"]
    if config.tokenizer.path is not None:
        fingerprint = hash_file(Path(config.tokenizer.path).expanduser())
        settings["tokenizer.fingerprint"] = fingerprint
    else:
        for key, value in values["tokenizer"].items():
            settings[f"tokenizer.{key}"] = value
    paths = find_sources(config)
    if verify is Verify.full:
        with ThreadPoolExecutor(count_workers(config)) as pool:
            hashes: list[str | None] = list(pool.map(hash_file, paths))
    else:
        hashes = [None] * len(paths)
    sources = [
        Source(str(path), path.stat().st_size, sha256)
        for path, sha256 in zip(paths, hashes, strict=True)
    ]
    return Origin(settings, sources)


def write_origin(folder: Path, origin: Origin) -> None:
    """Keeps the origin in the corpus folder."""
    sources = [source._asdict() for source in origin.sources]
    write_json(folder / FILE, {"settings": origin.settings, "sources": sources})


def read_origin(folder: Path) -> Origin:
    """The origin kept in the corpus folder.

    Raises:
        ValueError: The file is corrupted.
    """
    content = read_json(folder / FILE)
    try:
        sources = [Source(**source) for source in content["sources"]]
        return Origin(content["settings"], sources)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE} is corrupted ({error}); delete {folder}") from error


def refuse_change(folder: Path, *, kept: Origin, now: Origin) -> None:
    """Raises ValueError, naming the first differences, where the two origins differ."""
    differences = [
        f"data.{key} was {kept.settings.get(key)}, is {now.settings.get(key)}"
        for key in sorted((kept.settings.keys() | now.settings.keys()) - NOT_COMPARED)
        if kept.settings.get(key) != now.settings.get(key)
    ]
    before = {source.path: source for source in kept.sources}
    after = {source.path: source for source in now.sources}
    for path in sorted(before.keys() | after.keys()):
        if path not in after:
            differences.append(f"{path} is gone")
        elif path not in before:
            differences.append(f"{path} is new")
        elif _differ(before[path], after[path]):
            differences.append(f"{path} has changed")
    if differences:
        shown = "; ".join(differences[:3])
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"data.folder={folder} holds a corpus made from something else: {shown}{more}. "
            "Choose another data.folder, or delete this one to prepare it anew"
        )


def _differ(one: Source, other: Source) -> bool:
    hashes_known = one.sha256 is not None and other.sha256 is not None
    return one.num_bytes != other.num_bytes or (hashes_known and one.sha256 != other.sha256)
