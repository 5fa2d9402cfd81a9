"""A keyed permutation of range(size) that stores no order: one per key, any place at once."""

from math import isqrt
from typing import overload

import numpy as np
import numpy.typing as npt

from data.keyed_hash import Words, make_keys, mix

ROUNDS = 8
LARGEST_TABLE = 2**16
"""Halves whose hashes are looked up: 4 MiB for 2^32 items; those of more items are computed."""

Places = npt.NDArray[np.int64]


class Permutation:
    """A bijection of range(size), chosen by `key`, in bounded memory and constant time.

    A Feistel network over pairs (left, right) of a grid with at least `size` cells: each round
    adds a keyed hash of one half to the other. A result outside range(size) is sent through
    again (cycle walking; Black and Rogaway, CT-RSA 2002), which ends after about one round trip
    because the grid is hardly larger than `size`. Takes one place, or an array of them at a
    fraction of the cost. A half has only about sqrt(size) values, so their hashes are kept.
    """

    def __init__(self, size: int, *, key: bytes) -> None:
        assert 0 < size <= 2**62
        self._size = size
        self._rows = isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._keys = make_keys(key, ROUNDS)
        self._tables: list[Places] = []
        if self._rows <= LARGEST_TABLE:  # there are not more columns
            halves, keys = np.arange(self._rows), self._keys[:, None]
            tables = _hash(halves, keys[0::2], self._rows), _hash(halves, keys[1::2], self._columns)
            self._tables = [table for pair in zip(*tables, strict=True) for table in pair]

    @overload
    def __call__(self, place: int) -> int: ...
    @overload
    def __call__(self, place: Places) -> Places: ...
    def __call__(self, place: int | Places) -> int | Places:
        """The item that stands at `place`."""
        return self._walk(place, backwards=False)

    @overload
    def inverse(self, item: int) -> int: ...
    @overload
    def inverse(self, item: Places) -> Places: ...
    def inverse(self, item: int | Places) -> int | Places:
        """The place at which `item` stands."""
        return self._walk(item, backwards=True)

    def _walk(self, cells: int | Places, *, backwards: bool) -> int | Places:
        through = self._decrypt if backwards else self._encrypt
        found = np.atleast_1d(np.asarray(cells, np.int64))
        assert ((found >= 0) & (found < self._size)).all()
        found = through(found)
        while (outside := np.flatnonzero(found >= self._size)).size:
            found[outside] = through(found[outside])
        return int(found[0]) if isinstance(cells, int) else found

    def _encrypt(self, cells: Places) -> Places:
        rows, columns = self._rows, self._columns
        left = cells // columns
        right = cells - left * columns
        for number in range(0, ROUNDS, 2):
            left += self._step(number, right)
            left = _least_natural(left, left - rows)
            right += self._step(number + 1, left)
            right = _least_natural(right, right - columns)
        return left * columns + right

    def _decrypt(self, cells: Places) -> Places:
        rows, columns = self._rows, self._columns
        left = cells // columns
        right = cells - left * columns
        for number in reversed(range(0, ROUNDS, 2)):
            right -= self._step(number + 1, left)
            right = _least_natural(right, right + columns)
            left -= self._step(number, right)
            left = _least_natural(left, left + rows)
        return left * columns + right

    def _step(self, number: int, halves: Places) -> Places:
        """What a round adds to one half, as the other one decides: below its size."""
        if self._tables:
            return self._tables[number].take(halves, mode="clip")  # all are in range
        size = self._columns if number % 2 else self._rows
        return _hash(halves, self._keys[number], size)


def _hash(halves: Places, keys: Words | np.uint64, size: int) -> Places:
    """Hashes in range(size), of the shape that halves and keys have together."""
    words = mix(halves.astype(np.uint64) ^ keys)
    words -= words // np.uint64(size) * np.uint64(size)  # numpy divides faster than it does %
    return words.astype(np.int64)


def _least_natural(one: Places, other: Places) -> Places:
    """Of each two numbers the smaller one that is not negative (one of them isn't)."""
    return np.minimum(one.view(np.uint64), other.view(np.uint64)).view(np.int64)
