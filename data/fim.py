"""Fill in the middle (arXiv:2207.14255): some documents are read with their middle last.

A document [bos] p m s [eos] is read as [bos] <begin> p <hole> s <end> m [eos] (PSM, prefix suffix
middle; the format of DeepSeek-Coder, arXiv:2401.14196, 3.1.2) or as [bos] <begin> <hole> s <end>
p m [eos] (SPM). Borders fall between stored tokens, so nothing is tokenized again and the length
is known beforehand: three more than stored. Which documents, in which way and where they are cut
is a pure function of a key, the document and nothing else.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.keyed_hash import Words, make_keys, mix, mix_one, to_unit
from data.tokenizer import FimIds

MARKERS = 3
"""Tokens by which a document grows."""


class FimMode(StrEnum):
    """In which order the parts of a rearranged document are read."""

    psm = "psm"  # prefix, suffix, middle
    spm = "spm"  # suffix, prefix, middle
    mix = "mix"  # one half of the rearranged documents so, the other half so


@dataclass(slots=True, kw_only=True)
class FimConfig:
    #: Share of the training documents that are rearranged, each anew in every epoch.
    rate: float = 0.0
    #: psm (prefix, suffix, middle), spm (suffix, prefix, middle) or mix (half of each).
    mode: FimMode = FimMode.psm


def check_fim(config: FimConfig) -> None:
    """Raises ValueError where the rate is no share."""
    if not 0 <= config.rate <= 1:
        raise ValueError(f"data.fim.rate={config.rate} must lie in [0, 1]; choose e.g. 0.5")


class FimSetting(NamedTuple):
    """The config's values, as a position keeps them."""

    rate: float
    mode: FimMode


NO_FIM = FimSetting(0.0, FimMode.psm)

Part = int | tuple[int, int]
"""A marker's id, or a range of the document's stored tokens."""


class Fim:
    """Decides for the documents of one source and epoch."""

    def __init__(self, setting: FimSetting, ids: FimIds, *, key: bytes) -> None:
        self._rate = setting.rate
        self._spm_share = {FimMode.psm: 0.0, FimMode.spm: 1.0, FimMode.mix: 0.5}[setting.mode]
        self._ids = ids
        self._keys = make_keys(key, 4)

    def are_chosen(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each document is rearranged, [N]."""
        return np.asarray(to_unit(self._draw(0, documents)) < self._rate)

    def arrange(self, document: int, first: int, last: int, length: int) -> list[Part]:
        """The parts of a chosen document in the order of reading.

        Of its `length` stored tokens those in [first, last) are text, the others bos and eos.
        Both cuts are uniform over the places between tokens, both ends included.
        """
        drawn = [mix_one(mix_one(document ^ key) + key & 2**64 - 1) for key in self._keys.tolist()]
        cuts = sorted(first + word % (last - first + 1) for word in drawn[1:3])
        prefix, middle, suffix = (first, cuts[0]), (cuts[0], cuts[1]), (cuts[1], last)
        ids = self._ids
        parts: list[Part]
        if (drawn[3] >> 11) * 2.0**-53 < self._spm_share:
            parts = [ids.prefix, ids.suffix, suffix, ids.middle, prefix, middle]
        else:
            parts = [ids.prefix, prefix, ids.suffix, suffix, ids.middle, middle]
        return [(0, first), *parts, (last, length)]

    def _draw(self, number: int, documents: npt.NDArray[np.int64]) -> Words:
        return mix(mix(documents.astype(np.uint64) ^ self._keys[number]) + self._keys[number])
