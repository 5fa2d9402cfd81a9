"""Who is missing, from what every rank says of itself."""

import time

from train.watch.stall import COMPUTING, Statement, explain


def statement(rank: int, activity: str, *, number: int = 7, **more: object) -> Statement:
    values = {"place": "layers.3.ffn", "is_collective": True, "detail": {}, "seconds": 40.0}
    if activity in (COMPUTING, "data wait"):
        values |= {"place": "", "is_collective": False}
    return Statement(
        rank=rank,
        host=f"node{rank // 2}",
        pid=rank,
        step=12,
        activity=activity,
        number=number,
        time=time.time(),
        **{**values, **more},  # type: ignore[arg-type]
    )


def test_a_rank_without_a_word_is_missing_and_its_last_words_are_kept() -> None:
    said = {rank: statement(rank, "dispatch") for rank in (0, 1, 3)}
    before = {2: statement(2, COMPUTING)}
    found = explain(said, before, num_ranks=4)
    assert found.missing == [2]
    assert found.waiting == [0, 1, 3]
    assert found.summary.startswith("ranks 0, 1, 3 wait in dispatch of layers.3.ffn, step 12")
    assert "missing: rank 2 on node1" in found.summary
    assert any("rank 2: no word" in line and "it said: rank 2" in line for line in found.lines)


def test_a_rank_that_waits_for_data_is_missing_from_the_others_collective() -> None:
    said = {0: statement(0, "agreement on the host"), 1: statement(1, "data wait")}
    found = explain(said, {}, num_ranks=2)
    assert found.missing == [1]
    assert "rank 1 on node0 (data wait)" in found.summary


def test_where_all_wait_those_behind_in_the_sequence_are_missing() -> None:
    said = {
        0: statement(0, "combine", number=9),
        1: statement(1, "dispatch", number=8),
        2: statement(2, "combine", number=9),
    }
    assert explain(said, {}, num_ranks=3).missing == [1]


def test_where_all_wait_in_the_same_collective_nobody_is_missing() -> None:
    said = {rank: statement(rank, "gradient reduction") for rank in range(2)}
    found = explain(said, {}, num_ranks=2)
    assert found.missing == []
    assert "the network?" in found.summary


def test_token_counts_of_the_exchange_are_told() -> None:
    said = {0: statement(0, "dispatch", detail={"sent": [3, 5], "received": [4, 4]})}
    (line,) = explain(said, {}, num_ranks=1).lines
    assert "sent [3, 5], received [4, 4]" in line
