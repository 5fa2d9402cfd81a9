"""Keys of two configs whose values differ."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Change(NamedTuple):
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def diff_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Leaves of two nested mappings that differ, in the order of the first; absent is None."""
    old_leaves, new_leaves = dict(_leaves(old)), dict(_leaves(new))
    return [
        Change(key, old_leaves.get(key), new_leaves.get(key))
        for key in {**old_leaves, **new_leaves}
        if old_leaves.get(key) != new_leaves.get(key)
    ]


def _leaves(values: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
