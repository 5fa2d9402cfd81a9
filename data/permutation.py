"""A keyed permutation of range(size) that stores nothing: one order per key, any place at once."""

from hashlib import blake2b
from math import isqrt

ROUNDS = 8


class Permutation:
    """A bijection of range(size), chosen by `key`, in constant memory and time.

    A Feistel network over pairs (left, right) of a grid with at least `size` cells: each round
    adds a keyed hash of one half to the other. A result outside range(size) is sent through
    again (cycle walking; Black and Rogaway, CT-RSA 2002), which ends after about one round trip
    because the grid is hardly larger than `size`.
    """

    def __init__(self, size: int, *, key: bytes) -> None:
        assert size > 0
        self._size = size
        self._rows = isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._key = blake2b(key, digest_size=32).digest()

    def __call__(self, place: int) -> int:
        """The item that stands at `place`."""
        assert 0 <= place < self._size
        place = self._encrypt(place)
        while place >= self._size:
            place = self._encrypt(place)
        return place

    def inverse(self, item: int) -> int:
        """The place at which `item` stands."""
        assert 0 <= item < self._size
        item = self._decrypt(item)
        while item >= self._size:
            item = self._decrypt(item)
        return item

    def _encrypt(self, cell: int) -> int:
        left, right = divmod(cell, self._columns)
        for number in range(0, ROUNDS, 2):
            left = (left + self._hash(number, right)) % self._rows
            right = (right + self._hash(number + 1, left)) % self._columns
        return left * self._columns + right

    def _decrypt(self, cell: int) -> int:
        left, right = divmod(cell, self._columns)
        for number in reversed(range(0, ROUNDS, 2)):
            right = (right - self._hash(number + 1, left)) % self._columns
            left = (left - self._hash(number, right)) % self._rows
        return left * self._columns + right

    def _hash(self, number: int, half: int) -> int:
        message = number.to_bytes(1) + half.to_bytes(8)
        return int.from_bytes(blake2b(message, key=self._key, digest_size=8).digest())
