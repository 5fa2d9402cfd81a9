"""Who sits where: the grid as text, nodes, routing groups on nodes."""

from train.layout.placement import (
    Seat,
    describe_placement,
    draw_grid,
    find_nodes,
    place_routing_groups,
)


def seats(
    num_ranks: int, *, per_node: int, expert: int, num_experts: int, sequence: int = 1
) -> list[Seat]:
    held = num_experts // expert
    nodes = find_nodes([rank % per_node for rank in range(num_ranks)])
    result = []
    for rank in range(num_ranks):
        first = rank - rank % expert
        place = rank - first
        experts = range(place * held, (place + 1) * held)
        group = tuple(range(first, first + expert))
        replica, part = divmod(rank, sequence)
        result.append(Seat(rank, nodes[rank], replica, 0, part, group, experts))
    return result


def test_the_grid_of_four_ranks_with_two_expert_groups() -> None:
    assert draw_grid(seats(4, per_node=4, expert=2, num_experts=8)) == (
        "rank  node  replica  expert group  experts\n"
        "   0     0        0             0      0-3\n"
        "   1     0        1             0      4-7\n"
        "   2     0        2             1      0-3\n"
        "   3     0        3             1      4-7"
    )


def test_the_grid_of_two_nodes_with_sequences_in_parts() -> None:
    grid = draw_grid(seats(4, per_node=2, expert=1, num_experts=2, sequence=2))
    assert grid == (
        "rank  node  replica  part of sequence  expert group  experts\n"
        "   0     0        0                 0             0      0-1\n"
        "   1     0        0                 1             1      0-1\n"
        "   2     1        1                 0             2      0-1\n"
        "   3     1        1                 1             3      0-1"
    )


def test_the_grid_of_a_dense_model_has_no_experts() -> None:
    grid = draw_grid(seats(2, per_node=2, expert=1, num_experts=0))
    assert grid == "rank  node  replica\n   0     0        0\n   1     0        1"


def test_the_grid_of_a_pipeline_names_each_ranks_place_in_it() -> None:
    plain = seats(4, per_node=4, expert=2, num_experts=8)
    staged = [seat._replace(replica=seat.rank % 2, stage=seat.rank // 2) for seat in plain]
    assert draw_grid(staged) == (
        "rank  node  replica  pipeline rank  expert group  experts\n"
        "   0     0        0              0             0      0-3\n"
        "   1     0        1              0             0      4-7\n"
        "   2     0        0              1             1      0-3\n"
        "   3     0        1              1             1      4-7"
    )


def test_the_grid_of_many_ranks_leaves_out_its_middle() -> None:
    lines = draw_grid(seats(64, per_node=8, expert=8, num_experts=64)).splitlines()
    assert len(lines) == 34
    assert lines[16].split() == ["15", "1", "15", "1", "56-63"]
    assert lines[17] == "... 32 more ..."
    assert lines[18].split() == ["48", "6", "48", "6", "0-7"]


def test_nodes_follow_from_the_places_on_them_even_if_they_differ_in_size() -> None:
    assert find_nodes([0, 1, 0, 1, 2, 0]) == [0, 0, 1, 1, 1, 2]


def test_v3s_eight_groups_fit_eight_nodes() -> None:
    on_nodes = seats(64, per_node=8, expert=64, num_experts=256)
    assert place_routing_groups(on_nodes, num_groups=8) == [(node,) for node in range(8)]
    (line,) = describe_placement(on_nodes, num_groups=8, top_groups=4)
    assert line.startswith("routing groups: 0 on node 0, 1 on node 1, ")
    assert line.endswith("a token is sent to 4 groups at most")


def test_expert_groups_inside_nodes_need_no_word() -> None:
    inside = seats(16, per_node=8, expert=8, num_experts=64)
    assert describe_placement(inside, num_groups=1, top_groups=1) == []


def test_experts_over_nodes_without_routing_groups_are_warned_of() -> None:
    spread = seats(16, per_node=8, expert=16, num_experts=64)
    (line,) = describe_placement(spread, num_groups=1, top_groups=1)
    assert "parallel.expert=16 spreads experts over nodes" in line
    assert "choose a parallel.expert that divides the 8 ranks of a node" in line


def test_routing_groups_torn_between_nodes_are_named() -> None:
    spread = seats(24, per_node=8, expert=24, num_experts=48)
    (line,) = describe_placement(spread, num_groups=4, top_groups=2)
    assert "groups 1, 2 lie on several" in line
    assert "a multiple of 3 groups" in line
