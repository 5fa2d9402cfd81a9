"""A keyed permutation of range(size) that stores nothing: one order per key, any place at once."""

from math import isqrt
from typing import overload

import numpy as np
import numpy.typing as npt

from data.keyed_hash import Words, make_keys, mix

ROUNDS = 8

Places = npt.NDArray[np.int64]


class Permutation:
    """A bijection of range(size), chosen by `key`, in constant memory and time.

    A Feistel network over pairs (left, right) of a grid with at least `size` cells: each round
    adds a keyed hash of one half to the other. A result outside range(size) is sent through
    again (cycle walking; Black and Rogaway, CT-RSA 2002), which ends after about one round trip
    because the grid is hardly larger than `size`. Takes one place, or an array of them at a
    fraction of the cost.
    """

    def __init__(self, size: int, *, key: bytes) -> None:
        assert 0 < size <= 2**62
        self._size = np.uint64(size)
        self._rows = np.uint64(isqrt(size - 1) + 1)
        self._columns = np.uint64(-(-size // int(self._rows)))
        self._keys = make_keys(key, ROUNDS)

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
        words = np.atleast_1d(np.asarray(cells)).astype(np.uint64)
        assert (words < self._size).all()
        words = through(words)
        while (outside := np.flatnonzero(words >= self._size)).size:
            words[outside] = through(words[outside])
        return int(words[0]) if isinstance(cells, int) else words.astype(np.int64)

    def _encrypt(self, cells: Words) -> Words:
        left, right = np.divmod(cells, self._columns)
        for number in range(0, ROUNDS, 2):
            left = (left + self._hash(number, right) % self._rows) % self._rows
            right = (right + self._hash(number + 1, left) % self._columns) % self._columns
        return left * self._columns + right

    def _decrypt(self, cells: Words) -> Words:
        left, right = np.divmod(cells, self._columns)
        rows, columns = self._rows, self._columns
        for number in reversed(range(0, ROUNDS, 2)):
            right = (right + columns - self._hash(number + 1, left) % columns) % columns
            left = (left + rows - self._hash(number, right) % rows) % rows
        return left * self._columns + right

    def _hash(self, number: int, halves: Words) -> Words:
        return mix(halves ^ self._keys[number])
