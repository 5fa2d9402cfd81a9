"""The unigram loss equals the sum over tokens written out."""

from math import log
from pathlib import Path

import numpy as np
import pytest

from data.manifest import Split
from data.prepare import Prepared
from data.shards import Shard, write_shard
from data.unigram import count_tokens, load_counts, unigram_cross_entropy


def test_the_cross_entropy_is_that_of_each_token_in_turn() -> None:
    train, validation = [0, 0, 0, 1, 1, 3], [0, 2, 3]
    probabilities = [(train.count(token) + 1) / (len(train) + 4) for token in range(4)]
    expected = -sum(log(probabilities[token]) for token in validation) / len(validation)
    train_counts, validation_counts = (np.bincount(x, minlength=4) for x in (train, validation))
    assert unigram_cross_entropy(train_counts, validation_counts) == pytest.approx(expected)


def test_counts_add_up_over_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[0, 5], [5]], vocab_size=7)
    write_shard(tmp_path / "b", [[1, 5]], vocab_size=7)
    counts = count_tokens([tmp_path / "a", tmp_path / "b"], vocab_size=7)
    assert counts.tolist() == [1, 1, 0, 0, 0, 3, 0]


@pytest.mark.parametrize("split", list(Split))
def test_prepare_keeps_the_counts_of_each_split(prepared: Prepared, split: Split) -> None:
    record = prepared.manifest.split(split)
    tokens = [t for x in record.shards for t in Shard(prepared.folder / x.name).tokens.tolist()]
    counts = load_counts(prepared.folder / record.unigram.name)
    assert counts.tolist() == np.bincount(tokens, minlength=400).tolist()
