"""The permutation is one, in both directions, and leaves no order behind."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from data.permutation import Permutation


@given(size=st.integers(1, 2000), key=st.binary(max_size=80))
def test_it_is_a_bijection_of_the_range(size: int, key: bytes) -> None:
    permutation = Permutation(size, key=key)
    items = [permutation(place) for place in range(size)]
    assert sorted(items) == list(range(size))
    assert [permutation.inverse(item) for item in items] == list(range(size))


@given(size=st.integers(1, 2**60), place=st.integers(0, 2**60), key=st.binary(max_size=8))
def test_its_inverse_finds_the_place_in_a_huge_range(size: int, place: int, key: bytes) -> None:
    permutation = Permutation(size, key=key)
    item = permutation(place % size)
    assert 0 <= item < size
    assert permutation.inverse(item) == place % size


def test_another_key_is_another_order() -> None:
    first, second = Permutation(1000, key=b"0 0"), Permutation(1000, key=b"0 1")
    agreements = sum(first(place) == second(place) for place in range(1000))
    assert agreements < 10  # one is expected


def test_it_mixes_as_a_random_order_does() -> None:
    size = 10_000
    permutation = Permutation(size, key=b"mix")
    items = [permutation(place) for place in range(size)]
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
