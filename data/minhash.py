"""MinHash of documents by datatrove, in bands. Imported only when it is asked for.

Two documents whose shingles (runs of words, case, punctuation and accents aside) overlap by a share
s agree in one hash with probability s, in all `rows` of a band with s^rows, and in at least one of
the bands with 1 - (1 - s^rows)^bands.
"""

from hashlib import blake2b
from tempfile import gettempdir

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig

from data.quality import Words
from data.select import SelectConfig

SHINGLES_AT_ONCE = 2**14  # each takes 8 bytes per hash while its hashes are compared


class MinHash:
    """Hashes of bands, the same on every machine."""

    def __init__(self, config: SelectConfig) -> None:
        # Its step of a pipeline wants a folder and writes nothing there unless it is run.
        # SHA-1, because datatrove 0.10's xxhash functions refuse strings under xxhash 4.
        self._signer = MinhashDedupSignature(
            gettempdir(),
            MinhashConfig(
                n_grams=config.ngram,
                num_buckets=config.bands,
                hashes_per_bucket=config.rows,
                hash_config=HashConfig(hash_fc="sha1"),
            ),
            language=Words(),
        )

    def hash_bands(self, text: str) -> npt.NDArray[np.uint64] | None:
        """One hash per band, [bands]; None for a text of fewer words than a shingle has."""
        shingles = self._signer.get_shingles(text)
        if len(shingles) == 0:
            return None
        parts = range(0, len(shingles), SHINGLES_AT_ONCE)
        smallest = np.minimum.reduce(
            [self._signer.get_signature(shingles[at : at + SHINGLES_AT_ONCE]) for at in parts]
        )
        digests = [blake2b(band.astype("<u8").tobytes(), digest_size=8) for band in smallest]
        return np.array([int.from_bytes(digest.digest()) for digest in digests], np.uint64)
