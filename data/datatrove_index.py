"""Where documents lie in datatrove's token files: `NAME.ds` holds the tokens, `NAME.ds.index` ends.

Both are little-endian without a header (datatrove/pipeline/tokens/tokenizer.py): tokens u16 or u32,
and for each document the place after its last token, u64[D]. `NAME.ds.loss`, if there is one, holds
a byte per token: 0 where no loss is taken on predicting it.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SUFFIX = ".ds"
SCANNED_AT_ONCE = 2**22  # bytes of a mask
DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def mask_path(tokens_path: Path) -> Path:
    """The file that says where no loss is taken; most corpora have none."""
    return tokens_path.with_name(tokens_path.name + ".loss")


class Hidden(NamedTuple):
    """Tokens that no loss is taken on."""

    prompts: npt.NDArray[np.int32]  # how many at the beginning of each document
    total: int  # anywhere


class DatatroveIndex:
    """The documents of one `.ds` file; the type of its tokens follows from its size.

    Raises:
        ValueError: The index does not fit the tokens.
    """

    def __init__(self, tokens_path: Path, index_path: Path) -> None:
        self._mask = mask_path(tokens_path)
        size = index_path.stat().st_size
        self.ends: npt.NDArray[np.uint64] = np.zeros(0, "<u8")
        if size >= 8:
            self.ends = np.memmap(index_path, "<u8", mode="r", shape=(size // 8,))
        num_tokens = int(self.ends[-1]) if len(self.ends) else 0
        num_bytes = tokens_path.stat().st_size
        itemsize = num_bytes // num_tokens if num_tokens else 2
        if size % 8 or itemsize not in DTYPES or itemsize * num_tokens != num_bytes:
            raise ValueError(
                f"{tokens_path} holds {num_bytes} bytes, which are not the {num_tokens} tokens of "
                f"2 or 4 bytes that {index_path.name} lists: one of them is cut short"
            )
        self.dtype = DTYPES[itemsize]
        self.num_tokens = num_tokens
        self.num_documents = len(self.ends)

    def document_start(self, document: int) -> int:
        """The place of the document's first token."""
        return int(self.ends[document - 1]) if document else 0

    def all_starts(self) -> npt.NDArray[np.int64]:
        """The place of every document's first token, and the end, [num_documents + 1]."""
        return np.concatenate([np.zeros(1, np.int64), self.ends.astype(np.int64)])

    def prompt_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens from each document's first on that no loss is taken on, [num_documents]; 0
        without a mask. With one, nothing is learnt on any first token: there is no telling whether
        it is a bos.

        Raises:
            ValueError: The mask does not fit the tokens.
        """
        return self._hidden.prompts

    def count_hidden(self) -> int:
        """Tokens that no loss is taken on, first ones of documents included; 0 without a mask."""
        return self._hidden.total

    @cached_property
    def _hidden(self) -> Hidden:
        """What the mask hides, read in pieces."""
        if not self._mask.is_file():
            return Hidden(np.zeros(self.num_documents, np.int32), 0)
        size = self._mask.stat().st_size
        if size != self.num_tokens:
            raise ValueError(
                f"{self._mask} holds {size} bytes, {self.num_tokens} tokens are listed: it is cut "
                "short, or another file's"
            )
        borders = self.all_starts()
        starts, stops = borders[:-1], borders[1:]
        first_learnt = stops.copy()  # of each document; its end where nothing is
        num_learnt = 0
        with open(self._mask, "rb") as file:
            for begin in range(0, self.num_tokens, SCANNED_AT_ONCE):
                is_learnt = np.fromfile(file, np.uint8, SCANNED_AT_ONCE) != 0
                end = begin + len(is_learnt)
                firsts = starts[slice(*np.searchsorted(starts, [begin, end]))]
                is_learnt[firsts - begin] = False
                learnt = np.append(begin + np.flatnonzero(is_learnt), self.num_tokens)
                num_learnt += len(learnt) - 1
                here = slice(np.searchsorted(stops, begin, "right"), np.searchsorted(starts, end))
                found = learnt[np.searchsorted(learnt, starts[here])]
                first_learnt[here] = np.minimum(first_learnt[here], found)
        return Hidden((first_learnt - starts).astype(np.int32), self.num_tokens - num_learnt)
