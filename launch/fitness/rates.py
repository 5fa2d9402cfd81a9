"""The doctor's rates between nodes in words, the slowest link first."""

from collections.abc import Iterator
from typing import Any

GB = 1e9
LISTED = 10  # pairs at most: the slowest


def list_rates(rates: dict[str, Any], hosts: list[str]) -> list[str]:
    """A line for the whole group, one that names its slowest link, one for each pair."""
    pairs = sorted(rates["pairs"].items(), key=lambda item: _slower(item[1]))
    lines = [
        f"all nodes: all-reduce {rates['all_reduce'] / GB:.2f} GB/s, all-to-all "
        f"{rates['all_to_all'] / GB:.2f} GB/s",
        f"slowest link {_name(pairs[0][0], hosts)}",
    ]
    for pair, rate in pairs[:LISTED]:
        lines.append(
            f"  {_name(pair, hosts)}: all-reduce {rate['all_reduce'] / GB:.2f} GB/s, all-to-all "
            f"{rate['all_to_all'] / GB:.2f} GB/s"
        )
    if len(pairs) > LISTED:
        lines.append(f"  ({len(pairs) - LISTED} faster pairs are not listed)")
    return lines


def describe_rates(
    rates: dict[str, Any], hosts: list[str], least: float
) -> Iterator[tuple[str, str, str]]:
    """Host, its slowest link in words, and the problem with it."""
    for node, host in enumerate(hosts):
        own = {pair: _slower(rate) for pair, rate in rates["pairs"].items() if node in _ends(pair)}
        pair, rate = min(own.items(), key=lambda item: item[1])
        (peer,) = {hosts[end] for end in _ends(pair)} - {host}
        text = f"{rate / GB:.2f} GB/s to {peer}"
        yield host, text, f"{text}, {least:g} needed" if rate / GB < least else ""


def _slower(rate: dict[str, float]) -> float:
    return min(rate["all_reduce"], rate["all_to_all"])


def _ends(pair: str) -> list[int]:
    return [int(end) for end in pair.split("-")]


def _name(pair: str, hosts: list[str]) -> str:
    return " - ".join(hosts[end] for end in _ends(pair))
