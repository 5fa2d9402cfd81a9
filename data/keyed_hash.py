"""Numbers that look random and are not: 64 bits out of a key and a number, for whole arrays."""

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]


def make_keys(key: bytes, count: int) -> Words:
    """`count` words that depend on all of `key`, [count]."""
    digests = (
        blake2b(key, digest_size=8, salt=number.to_bytes(8), person=b"keys").digest()
        for number in range(count)
    )
    return np.array([int.from_bytes(digest) for digest in digests], np.uint64)


def mix(words: Words) -> Words:
    """A bijection of 64-bit words in which every bit of the input moves half of the output's.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def mix_one(word: int) -> int:
    """The same for one word, without the cost of an array."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & 2**64 - 1
    return word ^ (word >> 31)


def to_unit(words: Words) -> npt.NDArray[np.float64]:
    """The words as uniform numbers in [0, 1), of 53 bits each."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
