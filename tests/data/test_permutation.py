"""The permutation is one, in both directions, and leaves no order behind."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.permutation import Permutation


@given(size=st.integers(1, 2000), key=st.binary(max_size=80))
def test_it_is_a_bijection_of_the_range(size: int, key: bytes) -> None:
    permutation = Permutation(size, key=key)
    items = permutation(np.arange(size))
    assert sorted(items.tolist()) == list(range(size))
    assert permutation.inverse(items).tolist() == list(range(size))
    assert permutation(size // 2) == items[size // 2]  # one at a time is the same


@given(size=st.integers(1, 2**60), place=st.integers(0, 2**60), key=st.binary(max_size=8))
def test_its_inverse_finds_the_place_in_a_huge_range(size: int, place: int, key: bytes) -> None:
    permutation = Permutation(size, key=key)
    item = permutation(place % size)
    assert 0 <= item < size
    assert permutation.inverse(item) == place % size


def test_another_key_is_another_order() -> None:
    first, second = Permutation(1000, key=b"0 0"), Permutation(1000, key=b"0 1")
    agreements = int((first(np.arange(1000)) == second(np.arange(1000))).sum())
    assert agreements < 10  # one is expected


def test_it_mixes_as_a_random_order_does() -> None:
    size = 10_000
    permutation = Permutation(size, key=b"mix")
    items = permutation(np.arange(size)).tolist()
    # Bounds are about five standard deviations of a uniformly random permutation.
    assert sum(item == place for place, item in enumerate(items)) <= 8
    neighbours = sum(abs(one - other) == 1 for one, other in pairwise(items))
    assert neighbours <= 10  # two are expected
    mean_move = sum(abs(item - place) for place, item in enumerate(items)) / size
    assert abs(mean_move / size - 1 / 3) < 0.012
    halves = sum(item < size // 2 for item in items[: size // 2])
    assert abs(halves - size // 4) < 130
    parities = sum(item % 2 == place % 2 for place, item in enumerate(items))
    assert abs(parities - size // 2) < 250
