"""The order of a run equals a slow reference, whatever changes and wherever it resumes."""

import json
import re
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import Batches
from data.blend import Blend, StageConfig
from data.fim import NO_FIM, FimMode, FimSetting
from data.mixture import Mixture, Row
from data.packing import Packing
from data.position import Position, read_position
from data.rows import Rows, stack_rows
from data.samples import Sample
from data.source import Source
from tests.data.orders import ListedIndex, Setting, SlowOrder, Token

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
corpora = st.fixed_dictionaries(dict.fromkeys("abc", lengths))
fims = st.sampled_from([NO_FIM, FimSetting(0.5, FimMode.psm), FimSetting(1.0, FimMode.mix)])
weights = st.dictionaries(st.sampled_from("abc"), st.floats(0.05, 1), min_size=1)
changes = st.builds(
    Setting, weights, st.integers(1, 30), st.sampled_from(list(Packing)), fims, st.none()
)


def tokens_of(row: Row) -> list[Token]:
    return [(place, offset + k) for place, offset, length in row.pieces for k in range(length)]


def enter(position: Position) -> Position:
    """As `TrainingData.enter` where the blend is new, out of a checkpoint."""
    kept = read_position(json.loads(json.dumps(asdict(position))))
    assert kept == position
    return replace(kept, sources={n: replace(at, credit=0) for n, at in kept.sources.items()})


@settings(max_examples=60, deadline=None)
@given(
    corpora=corpora,
    stretches=st.lists(st.tuples(changes, st.integers(1, 30)), min_size=1, max_size=5),
    data=st.data(),
)
def test_the_order_equals_the_slow_one_and_skips_or_repeats_nothing(
    corpora: dict[str, list[int]], stretches: list[tuple[Setting, int]], data: st.DataObject
) -> None:
    slow = SlowOrder(corpora, seed=5)
    position = Position()
    read: dict[tuple[str, int], list[int]] = defaultdict(list)  # offsets by source and place
    for setting, count in stretches:
        position = enter(position)
        slow.change_blend()
        expected = [slow.next_row(setting) for _ in range(count)]
        drawn: list[Row] = []
        while len(drawn) < count:  # in batches of any size, each of a mixture opened anew
            size = data.draw(st.integers(1, count - len(drawn)))
            rows, position = setting.mixture(corpora, 5).draw(position, size)
            drawn += rows
        assert [(row.source, tokens_of(row)) for row in drawn] == expected
        for row in drawn:
            assert 1 <= len(tokens_of(row)) <= setting.seq_len
            for place, offset in tokens_of(row):
                read[row.source, place].append(offset)
    for name, at in position.sources.items():
        order = Source(name, ListedIndex(corpora[name]), seed=5)
        for place in range(at.document):  # all that lies before the open window
            length, offsets = order.length(place, NO_FIM), sorted(read[name, place])
            assert offsets in (list(range(length)), list(range(length + 3)))
    assert all(len(set(offsets)) == len(offsets) for offsets in read.values())
    assert sum(map(len, read.values())) == position.tokens


class Identities:
    """A mixture's rows, read as numbers that say which tokens they hold."""

    def __init__(self, mixture: Mixture) -> None:
        self.draw = mixture.draw

    def read(self, rows: list[Row], batch_size: int) -> list[Rows]:
        starts = range(0, len(rows), batch_size)
        return [stack_rows([self._read(row) for row in rows[n : n + batch_size]]) for n in starts]

    def _read(self, row: Row) -> Sample:
        ids = [ord(row.source) * 10**6 + place * 1000 + k for place, k in tokens_of(row)]
        padded = np.array(ids + [0] * (20 - len(ids)))
        return Sample(padded, padded, padded, padded > 0, [20])


@settings(max_examples=15, deadline=None)
@given(corpora=corpora, settings_=st.lists(changes, min_size=4, max_size=4), seed=st.integers(0, 9))
def test_ranks_may_go_from_1_to_4_to_2_to_3_while_the_blend_changes(
    corpora: dict[str, list[int]], settings_: list[Setting], seed: int
) -> None:
    slow = SlowOrder(corpora, seed=seed)
    position = Position()
    for world, setting in zip((1, 4, 2, 3), settings_, strict=True):
        setting = setting._replace(seq_len=min(setting.seq_len, 20))
        position = enter(position)
        slow.change_blend()
        expected = []
        for _ in range(2 * 12):
            name, tokens = slow.next_row(setting)
            ids = [ord(name) * 10**6 + place * 1000 + k for place, k in tokens]
            expected.append(ids + [0] * (20 - len(ids)))
        shares = []
        for rank in range(world):
            order, at = Identities(setting.mixture(corpora, seed)), position
            with Batches(order, rank=rank, world=world, micro_batch_size=1) as batches:
                first, at = batches.take(at, 12)
                second, at = batches.take(at, 12)
            shares.append([*first, *second])
        in_order = [share[m] for m in range(len(shares[0])) for share in shares]
        assert [ids for batch in in_order for ids in batch.tokens.tolist()] == expected
        position = at


@settings(max_examples=20, deadline=None)
@given(corpora=corpora, packing=st.sampled_from(list(Packing)), epochs=st.floats(1, 3))
def test_a_capped_source_is_read_so_often_and_then_left_out(
    corpora: dict[str, list[int]], packing: Packing, epochs: float
) -> None:
    setting = Setting({"a": 0.5, "b": 0.3, "c": 0.2}, 16, packing, NO_FIM, max_epochs=epochs)
    mixture, position, size = setting.mixture(corpora, 1), Position(), 0
    complaint = ""
    while not complaint:
        try:
            (row,), position = mixture.draw(position, 1)
            size += len(tokens_of(row))
        except ValueError as error:
            complaint = str(error)
    assert re.match(r"the data end after \d+ tokens: .*allow more epochs", complaint)
    orders = {name: Source(name, ListedIndex(corpora[name]), seed=1) for name in corpora}
    expected = sum(
        order.length(place, NO_FIM)
        for order in orders.values()
        for place in range(int(epochs * order.num_documents))
    )
    assert size == expected == position.tokens


@pytest.mark.parametrize("batches", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_shares_read_match_the_weights_over_a_million_samples(batches: int) -> None:
    corpora = {"a": [1000, 20, 300] * 900, "b": [64] * 4000, "c": [7, 5000] * 100}
    weights = {"a": 0.7, "b": 0.2937, "c": 0.0063}
    sources = [Source(name, ListedIndex(corpora[name]), seed=0) for name in corpora]
    mixture = Mixture(sources, Blend(weights), seq_len=512)
    position = Position()
    for _ in range(batches):
        _, position = mixture.draw(position, 10_000)
    assert position.samples == batches * 10_000
    for name, weight in weights.items():
        assert abs(position.sources[name].tokens / position.tokens - weight) < 0.001


def test_weights_move_with_the_tokens_read() -> None:
    stages = [
        StageConfig(from_tokens=1000, weights={"a": 1, "b": 3}),
        StageConfig(from_tokens=2000, weights={"b": 1}, ramp_tokens=1000),
    ]
    blend = Blend({"a": 2, "b": 0}, stages)
    assert blend.at(0) == blend.at(999) == {"a": 1, "b": 0}
    assert blend.at(1000) == blend.at(2000) == {"a": 0.25, "b": 0.75}
    assert blend.at(2500) == {"a": 0.125, "b": 0.875}
    assert blend.at(3000) == blend.at(10**9) == {"a": 0, "b": 1}
    assert [blend.holds_until(at) for at in (0, 1500, 2500, 3000)] == [1000, 2000, 2501, None]


def test_shares_follow_the_stages_of_a_blend() -> None:
    stages = [
        StageConfig(from_tokens=100_000, weights={"a": 1, "b": 3}),
        StageConfig(from_tokens=200_000, weights={"b": 1}, ramp_tokens=100_000),
    ]
    sources = [Source(name, ListedIndex([16] * 8), seed=0) for name in "ab"]
    mixture = Mixture(sources, Blend({"a": 1, "b": 0}, stages), seq_len=16)
    position, read = Position(), [0]
    for _ in range(4):
        _, position = mixture.draw(position, 100_000 // 16)
        read.append(position.sources["a"].tokens)
    shares = [(after - before) / 100_000 for before, after in pairwise(read)]
    assert shares == pytest.approx([1, 0.25, 0.125, 0], abs=0.001)
