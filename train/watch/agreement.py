"""The self check: ranks that should have the same config, weights and position say whether they do.

Before the first step and at every checkpoint each rank states what it has, item by item; every item
that several ranks state must be the same. Usually only one number per subject travels; when these
differ, the items do, and the run stops with the ranks that disagree and what they disagree on.
"""

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from train.engine.engine import Engine
from train.progress import Progress
from train.ranks import Ranks

PACKAGES = ("thrifty", "torch", "deepspeed", "numpy")
SHOWN = 3  # differing items that the message spells out
BLOCK = 1 << 16  # elements of a weight hashed at a time: on a CPU they stay in its cache
BLOCKS_ON_GPU = 64  # of those at a time, where starting a kernel costs more
ODD = -7046029254386353131  # 2^64 divided by the golden ratio, as a signed number

Statement = Mapping[str, str]  # of one subject: item -> value


class DisagreementError(Exception):
    """Ranks that must have the same do not; a run that went on would train another model."""


def check_agreement(
    engine: Engine, progress: Progress, config: Mapping[str, Any], ranks: Ranks
) -> None:
    """Compare config, versions, data position and weights over ranks.

    Experts are compared over the ranks that hold the same, ZeRO 3's parts of weights not at all:
    nobody else has them. Costs one pass over the weights and one message of the host.

    Raises:
        DisagreementError: On every rank: who disagrees, and on what.
    """
    if ranks.count == 1:
        return
    subjects: dict[str, Statement] = {
        "the config": flatten(config),
        "versions": read_versions(),
        "the data position": flatten(asdict(progress)),
        **hash_weights(engine),
    }
    compare(subjects, ranks, when=f"at step {progress.step}")


def compare(subjects: Mapping[str, Statement], ranks: Ranks, *, when: str) -> None:
    """Refuse, with a DisagreementError on all ranks, subjects that several ranks have otherwise."""
    everyones = ranks.gather({name: _digest(items) for name, items in subjects.items()})
    complaints = []
    for subject in sorted({name for digests in everyones for name in digests}):
        if len({digests[subject] for digests in everyones if subject in digests}) > 1:
            complaints += find_differences(subject, ranks.gather(dict(subjects.get(subject, {}))))
    if complaints:
        more = len(complaints) - SHOWN
        listed = "; ".join(complaints[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise DisagreementError(f"ranks disagree {when}: {listed}")


def find_differences(subject: str, statements: Iterable[Statement]) -> list[str]:
    """A sentence for each item that not all ranks which state it have alike."""
    values: dict[str, dict[str, list[int]]] = {}
    for rank, statement in enumerate(statements):
        for item, value in statement.items():
            values.setdefault(item, {}).setdefault(value, []).append(rank)
    return [
        f"{subject}: {item} is "
        + " but ".join(f"{value} on {_name(ranks)}" for value, ranks in of_item.items())
        for item, of_item in values.items()
        if len(of_item) > 1
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested plain values as `key.key` -> text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str)
    return flat


def read_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def hash_weights(engine: Engine) -> dict[str, Statement]:
    """Hashes of the weights and biases that this rank holds; its experts are another subject."""
    subjects: dict[str, dict[str, str]] = {}
    for part in engine.copies():
        end = part.start + part.data.numel()
        is_whole = part.data.numel() == math.prod(part.shape)
        subject = "weights" if is_whole else f"experts from element {part.start} to {end}"
        if engine.ranks.pipeline_rank:  # other stages have other layers
            subject = f"{subject} of pipeline rank {engine.ranks.pipeline_rank}"
        subjects.setdefault(subject, {})[part.name] = f"{hash_tensor(part.data):016x}"
    return dict(subjects)


@torch.no_grad()
def hash_tensor(values: Tensor) -> int:
    """64 bits that change with any single element, computed where the tensor is.

    The elements' bits, each times an odd number that depends on its place, added modulo 2^64.
    """
    bits = values.view(torch.int16 if values.element_size() == 2 else torch.int32)
    size = BLOCK if bits.device.type == "cpu" else BLOCK * BLOCKS_ON_GPU
    place = torch.arange(min(size, bits.numel()), device=bits.device)
    factors = (place * ODD) | 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for block in bits.split(size):
        total = total * ODD + (block.long() * factors[: block.numel()]).sum()
    return int(total.item()) % 2**64


def _digest(statement: Statement) -> str:
    text = json.dumps(statement, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _name(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
