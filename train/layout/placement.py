"""Which rank sits where: node, replica, experts; and whether routing's groups fit the nodes.

Ranks are numbered node by node, and an expert-parallel group is made of consecutive ranks, so it
lies inside a node whenever its size divides the node's. Where it must span nodes, node-limited
routing (arXiv:2412.19437, 2.1.2) bounds the traffic between them, provided that each routing group
lies on one node.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

MAX_ROWS = 32  # of the grid; beyond it the middle is left out


class Seat(NamedTuple):
    """One rank's place."""

    rank: int
    node: int
    replica: int  # ranks of a replica work on the same sequences
    stage: int  # its place in its replica's pipeline
    part: int  # of each sequence, under sequence parallelism
    expert_ranks: tuple[int, ...]  # the ranks over which the experts are spread, in order
    experts: range  # held by this rank


def find_nodes(local_ranks: Sequence[int]) -> list[int]:
    """Each rank's node, from all ranks' places on their nodes: a 0 begins the next one."""
    return [count - 1 for count in accumulate(int(place == 0) for place in local_ranks)]


def draw_grid(seats: Sequence[Seat]) -> str:
    """One line per rank, columns that say nothing left out."""
    groups = sorted({seat.expert_ranks for seat in seats})
    columns = {
        "rank": [str(seat.rank) for seat in seats],
        "node": [str(seat.node) for seat in seats],
        "replica": [str(seat.replica) for seat in seats],
    }
    if any(seat.stage for seat in seats):
        columns["pipeline rank"] = [str(seat.stage) for seat in seats]
    if any(seat.part for seat in seats):
        columns["part of sequence"] = [str(seat.part) for seat in seats]
    if any(seat.experts for seat in seats):
        columns["expert group"] = [str(groups.index(seat.expert_ranks)) for seat in seats]
        columns["experts"] = [describe_range(seat.experts) for seat in seats]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    if len(seats) > MAX_ROWS:
        half = MAX_ROWS // 2
        lines = [*lines[: half + 1], f"... {len(seats) - MAX_ROWS} more ...", *lines[-half:]]
    return "\n".join(lines)


def place_routing_groups(seats: Sequence[Seat], *, num_groups: int) -> list[tuple[int, ...]]:
    """The nodes on which each routing group's experts lie, in the first expert-parallel group."""
    first = [seat for seat in seats if seat.expert_ranks == seats[0].expert_ranks]
    num_experts = sum(len(seat.experts) for seat in first)
    size = num_experts // num_groups
    nodes: list[set[int]] = [set() for _ in range(num_groups)]
    for seat in first:
        for expert in seat.experts:
            nodes[expert // size].add(seat.node)
    return [tuple(sorted(of_group)) for of_group in nodes]


def describe_placement(seats: Sequence[Seat], *, num_groups: int, top_groups: int) -> list[str]:
    """What to know about experts that lie on several nodes; nothing if no group of ranks does."""
    node_of = {seat.rank: seat.node for seat in seats}
    spans = [{node_of[rank] for rank in seat.expert_ranks} for seat in seats]
    if all(len(nodes) <= 1 for nodes in spans):
        return []
    per_node = sum(seat.node == seats[0].node for seat in seats)
    size = len(seats[0].expert_ranks)
    inside = f"choose a parallel.expert that divides the {per_node} ranks of a node"
    if num_groups == 1:
        return [
            f"parallel.expert={size} spreads experts over nodes, and model.moe.router.num_groups=1 "
            f"sends tokens to any of them; {inside}, or as many routing groups as nodes"
        ]
    placed = place_routing_groups(seats, num_groups=num_groups)
    torn = [group for group, nodes in enumerate(placed) if len(nodes) > 1]
    if torn:
        return [
            f"model.moe.router.num_groups={num_groups} does not fit the nodes: groups "
            f"{', '.join(map(str, torn))} lie on several, so that top_groups={top_groups} does not "
            f"bound the nodes that a token is sent to; {inside}, or a multiple of "
            f"{len(set().union(*spans))} groups"
        ]
    on_node: dict[int, list[int]] = {}
    for group, (node,) in enumerate(placed):
        on_node.setdefault(node, []).append(group)
    where = ", ".join(f"{_join(groups)} on node {node}" for node, groups in on_node.items())
    return [f"routing groups: {where}; a token is sent to {top_groups} groups at most"]


def describe_range(numbers: range) -> str:
    """Such as 0-31, 4, or - for none."""
    if not numbers:
        return "-"
    last = numbers.stop - 1
    return str(last) if len(numbers) == 1 else f"{numbers.start}-{last}"


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
