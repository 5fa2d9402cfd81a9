"""A split of a prepared corpus as one stream of tokens, memory-mapped, its shards in order."""

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.config import Verify
from data.manifest import Split, TokenizerRecord, read_manifest, verify_corpus
from data.shards import Shard

OPEN_SHARDS = 256


class TokenStream:
    """Tokens and document borders of a split by their place in it.

    Opening checks the corpus (`verify`: hashes or sizes) and costs a look at each shard's record;
    shards are mapped when they are first read.

    Raises:
        ValueError: Unfinished or corrupted corpus, naming the file; a tokenizer other than
            `tokenizer_fingerprint`, if one is given.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        *,
        verify: Verify,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        manifest = read_manifest(folder)
        self.tokenizer: TokenizerRecord = manifest.tokenizer
        if tokenizer_fingerprint not in (None, self.tokenizer.fingerprint):
            raise ValueError(
                f"data.folder={folder} was made with the tokenizer "
                f"{self.tokenizer.fingerprint[:12]}, the model belongs to "
                f"{str(tokenizer_fingerprint)[:12]}; prepare the corpus with "
                "data.tokenizer.path set to the model's tokenizer"
            )
        verify_corpus(folder, manifest, verify=verify)
        record = manifest.split(split)
        self._folder = folder
        self._shards = record.shards
        self._starts = [0, *accumulate(shard.tokens for shard in record.shards)]
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        """The number of tokens."""
        return self._starts[-1]

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The tokens in [start, stop), [stop - start]."""
        pieces = [
            shard.tokens[start_here:stop_here]
            for shard, _, start_here, stop_here in self._overlaps(start, stop)
        ]
        return np.concatenate(pieces, dtype=np.int64)

    def token(self, place: int) -> int:
        """The token at a place."""
        number = bisect_right(self._starts, place) - 1
        return int(self._open(number).tokens[place - self._starts[number]])

    def read_into(self, row: npt.NDArray[np.int64], place: int) -> None:
        """Fill `row` with the tokens from a place on, all of one document."""
        number = bisect_right(self._starts, place) - 1
        start = place - self._starts[number]
        row[:] = self._open(number).tokens[start : start + len(row)]

    def document_starts(self, start: int, stop: int) -> list[int]:
        """Places in [start, stop) where a document begins."""
        return [
            shard_start + place
            for shard, shard_start, start_here, stop_here in self._overlaps(start, stop)
            for place in shard.document_starts(start_here, stop_here)
        ]

    def _overlaps(self, start: int, stop: int) -> list[tuple[Shard, int, int, int]]:
        """Shards that overlap [start, stop): each with its place and the range within it."""
        assert 0 <= start < stop <= len(self)
        overlaps = []
        number = bisect_right(self._starts, start) - 1
        while number < len(self._shards) and self._starts[number] < stop:
            first, last = self._starts[number], self._starts[number + 1]
            overlaps.append(
                (self._open(number), first, max(start, first) - first, min(stop, last) - first)
            )
            number += 1
        return overlaps

    def _open_shard(self, number: int) -> Shard:
        record = self._shards[number]
        shard = Shard(self._folder / record.name)
        if (len(shard.tokens), shard.num_documents) != (record.tokens, record.documents):
            raise ValueError(
                f"{self._folder / record.name}.idx lists {shard.num_documents} documents and "
                f"{len(shard.tokens)} tokens, the manifest {record.documents} and "
                f"{record.tokens}: the shard is corrupted; prepare the corpus again"
            )
        return shard
