"""The work of one process that selects documents: what is wrong with each, and what it resembles.

Of each shard it leaves `finished_shards/select-00000.npz`, which holds, for N documents:

    reasons     [R]     why documents are left out; "" of those that are not so far
    codes       [N]     of each document, the place in `reasons`
    text_hash   [N, 2]  128 bits of the text
    band_0 ...  [N]     MinHash, where it is asked for
    has_bands   [N]     whether a document is long enough for it
"""

from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.atomic_file import write_aside
from data.document import Document
from data.encode_shard import EMPTY, RECORDS
from data.select import SelectConfig
from data.shard_pool import hash_documents


class ExaminedShard(NamedTuple):
    """A shard whose findings are on disk."""

    text_sha256: str
    findings: Path


class ShardExaminer:
    """Examines the shards of one corpus, in any process."""

    def __init__(self, folder: Path, config: SelectConfig) -> None:
        self._folder = folder / RECORDS
        self._filters: Any = None
        self._minhash: Any = None
        self._num_bands = config.bands
        if config.filters:
            from data.quality import QualityFilters

            self._filters = QualityFilters(config.filters)
        if config.near_duplicates:
            from data.minhash import MinHash

            self._minhash = MinHash(config)

    def work(self, number: int, documents: list[Document]) -> ExaminedShard:
        """Writes the shard's findings."""
        faults = [self._find_fault(document) for document in documents]
        reasons, codes = np.unique(faults, return_inverse=True)
        hashes = b"".join(map(hash_text, documents))
        found: dict[str, npt.NDArray[Any]] = {
            "reasons": reasons,
            "codes": codes.astype(np.uint16),
            "text_hash": np.frombuffer(hashes, "<u8").reshape(-1, 2),
        }
        if self._minhash is not None:
            bands = [
                None if fault else self._minhash.hash_bands(document.whole.decode())
                for fault, document in zip(faults, documents, strict=True)
            ]
            nothing = np.zeros(self._num_bands, np.uint64)
            columns = np.array([nothing if one is None else one for one in bands]).T
            found |= {f"band_{number}": column for number, column in enumerate(columns)}
            found["has_bands"] = np.array([one is not None for one in bands], np.bool_)
        examined = ExaminedShard(hash_documents(documents), self._path(number))
        with write_aside(examined.findings) as file:
            np.savez(file, allow_pickle=False, text_sha256=examined.text_sha256, **found)
        return examined

    def read_kept(self, number: int) -> ExaminedShard | None:
        """The findings of an earlier run, if it has come so far."""
        path = self._path(number)
        if not path.is_file():
            return None
        with np.load(path) as found:
            return ExaminedShard(str(found["text_sha256"]), path)

    def _find_fault(self, document: Document) -> str:
        if document.left_out is not None:
            return document.left_out
        if not document.text:
            return EMPTY
        if self._filters is None:
            return ""
        return self._filters.find_fault(document.whole.decode()) or ""

    def _path(self, number: int) -> Path:
        return self._folder / f"select-{number:05d}.npz"


def hash_text(document: Document) -> bytes:
    """16 bytes that only documents of the same prompt and text share."""
    prompt = document.prompt or b""
    start = blake2b(len(prompt).to_bytes(8) + prompt, digest_size=16, person=b"duplicate")
    start.update(document.text)
    return start.digest()
