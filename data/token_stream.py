"""A split of a prepared corpus as one stream of tokens, memory-mapped, its shards in order."""

import mmap
import os
from bisect import bisect_left, bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.config import Verify
from data.gather import Gather, Tokens
from data.loss_masks import LossMasks, Mask
from data.manifest import Split, TokenizerRecord, read_manifest, verify_corpus
from data.remote import RemoteCorpus
from data.remote_file import RemoteTokens
from data.shards import Shard, bin_path

OPEN_SHARDS = 256

Numbers = npt.NDArray[np.int64]


class Located(NamedTuple):
    """Places by shard, arrays of [N]."""

    shards: Numbers
    places: Numbers


class TokenStream:
    """Tokens and document borders of a split by their place in it.

    Opening checks the corpus (`verify`: hashes or sizes) and costs a look at each shard's record;
    shards are mapped when they are first read.

    Raises:
        ValueError: Unfinished or corrupted corpus, naming the file; a tokenizer other than
            `tokenizer_fingerprint`, if one is given.
        OSError: On reading, a shard can't be opened or is damaged.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        *,
        verify: Verify,
        tokenizer_fingerprint: str | None = None,
        remote: RemoteCorpus | None = None,
    ) -> None:
        """`remote` is where the folder's shards come from; it checks what it copies."""
        manifest = read_manifest(folder)
        self.tokenizer: TokenizerRecord = manifest.tokenizer
        if tokenizer_fingerprint not in (None, self.tokenizer.fingerprint):
            raise ValueError(
                f"data.folder={folder} was made with the tokenizer "
                f"{self.tokenizer.fingerprint[:12]}, the model belongs to "
                f"{str(tokenizer_fingerprint)[:12]}; prepare the corpus with "
                "data.tokenizer.path set to the model's tokenizer"
            )
        if remote is None:
            verify_corpus(folder, manifest, verify=verify)
        self._remote = remote
        self._is_kept = remote.find_kept(manifest, split) if remote is not None else []
        record = manifest.split(split)
        self._folder = folder
        self._shards = record.shards
        masks = [shard.loss for shard in record.shards]
        self.masks = LossMasks(folder, masks) if any(masks) else None
        """Where no loss is taken in the midst of documents; most corpora have none."""
        self._starts = [0, *accumulate(shard.tokens for shard in record.shards)]
        self._borders = np.array(self._starts, np.int64)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._dtypes: dict[int, np.dtype[Any]] = {}  # of the shards that were opened once
        self._tokens = lru_cache(maxsize=OPEN_SHARDS)(self._open_tokens)
        self._afar: dict[int, RemoteTokens] = {}  # small; what a step fetches of them it drops
        self._gather = Gather()

    def __len__(self) -> int:
        """The number of tokens."""
        return self._starts[-1]

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The tokens in [start, stop), [stop - start].

        Raises:
            OSError: A shard can't be read any more; it is named.
        """
        pieces = [
            shard.tokens[start_here:stop_here]
            for shard, _, start_here, stop_here in self._overlaps(start, stop)
        ]
        try:
            return self._gather(pieces).astype(np.int64)
        except OSError as error:
            first, last = self.locate(np.array([start, stop - 1])).shards.tolist()
            fault = self.find_fault(set(range(first, last + 1)))
            raise OSError(fault or str(error)) from error

    def read_mask(self, start: int, stop: int) -> Mask:
        """Whether each token in [start, stop) is learnt, [stop - start], as far as masks say so.

        Raises:
            OSError: A mask can't be read any more.
        """
        learnt = np.ones(stop - start, np.uint8)
        first = bisect_right(self._starts, start) - 1
        for number in range(first, bisect_left(self._starts, stop)):
            mask = None if self.masks is None else self.masks.find(number)
            if mask is not None:
                begin = self._starts[number]
                own_start, own_stop = max(start, begin), min(stop, self._starts[number + 1])
                part = self._gather([mask[own_start - begin : own_stop - begin]])
                learnt[own_start - start : own_stop - start] = part
        return learnt

    def token(self, place: int) -> int:
        """The token at a place."""
        return int(self.gather([self.view(place, 1)])[0])

    def view(self, start: int, count: int) -> Tokens:
        """The tokens from a place on, all of one document, where they lie: for `gather`."""
        tokens, start = self.find(start)
        return tokens[start : start + count]

    def find(self, place: int) -> tuple[Tokens | RemoteTokens, int]:
        """The shard's tokens in which a place lies, and where."""
        number = bisect_right(self._starts, place) - 1
        return self.tokens(number), place - self._starts[number]

    def locate(self, places: Numbers) -> Located:
        """The shards of many places, and where they are in them."""
        shards = np.searchsorted(self._borders, places, side="right") - 1
        return Located(shards, places - self._borders[shards])

    def tokens(self, number: int) -> Tokens | RemoteTokens:
        """A shard's tokens, [num_tokens]; the shard is checked when it is opened first."""
        if self._remote is None or self._is_kept[number]:
            return self._tokens(number)
        if number not in self._afar:
            self._afar[number] = self._remote.open(self._shards[number])
        return self._afar[number]

    @property
    def is_remote(self) -> bool:
        """Whether shards may lie elsewhere."""
        return self._remote is not None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that tokens are stored in."""
        return self.tokens(0).dtype

    def gather(self, views: list[Tokens]) -> Tokens:
        """What several views hold, one after another, until the next call.

        Raises:
            OSError: A shard can't be read any more.
        """
        return self._gather(views)

    def drop_fetched(self) -> None:
        """Let go of what was fetched of shards without a copy."""
        for tokens in self._afar.values():
            tokens.drop()

    def close(self) -> None:
        """Let go of all shards; they are opened again when they are read."""
        self._open.cache_clear()
        self._tokens.cache_clear()
        self._afar.clear()
        if self.masks is not None:
            self.masks.close()

    def find_fault(self, shards: set[int]) -> str | None:
        """What is wrong with the files of some shards, if that can be seen; of those without a
        local copy it can't."""
        for number in sorted(shards):
            if self._remote is not None and not self._is_kept[number]:
                continue
            record = self._shards[number]
            for file in filter(None, (record.bin, record.loss)):
                path = self._folder / file.name
                try:
                    size = path.stat().st_size
                except OSError as error:
                    return str(error)
                if size != file.num_bytes:
                    return f"{path} has {size} bytes, was prepared with {file.num_bytes}"
        return None

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

    def _open_tokens(self, number: int) -> Tokens:
        if self._remote is not None:
            self._remote.copy(self._shards[number].bin)
        if number not in self._dtypes:
            self._dtypes[number] = self._open_shard(number).tokens.dtype
            if self._dtypes[number] != self.dtype:
                raise OSError(
                    f"{self._folder}: the shards {self._shards[0].name} and "
                    f"{self._shards[number].name} hold tokens of two types; prepare it again"
                )
        if not self._shards[number].tokens:
            return np.zeros(0, self._dtypes[number])  # what is empty can't be mapped
        with open(bin_path(self._folder / self._shards[number].name), "rb") as file:
            if os.fstat(file.fileno()).st_size != self._shards[number].bin.num_bytes:
                raise OSError(self.find_fault({number}))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, self._dtypes[number])

    def _open_shard(self, number: int) -> Shard:
        record = self._shards[number]
        if self._remote is not None:
            self._remote.copy(record.bin)
            self._remote.copy(record.idx)
        try:
            shard = Shard(self._folder / record.name)
        except ValueError as error:  # in the midst of a run, which saves and stops at an OSError
            raise OSError(str(error)) from error
        if (len(shard.tokens), shard.num_documents) != (record.tokens, record.documents):
            raise OSError(
                f"{self._folder / record.name}.idx lists {shard.num_documents} documents and "
                f"{len(shard.tokens)} tokens, the manifest {record.documents} and "
                f"{record.tokens}: the shard is corrupted; prepare the corpus again"
            )
        return shard
