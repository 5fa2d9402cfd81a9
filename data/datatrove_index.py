"""Where documents lie in datatrove's token files: `NAME.ds` holds the tokens, `NAME.ds.index` ends.

Both are little-endian without a header (datatrove/pipeline/tokens/tokenizer.py): tokens u16 or u32,
and for each document the place after its last token, u64[D].
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SUFFIX = ".ds"
DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class DatatroveIndex:
    """The documents of one `.ds` file; the type of its tokens follows from its size.

    Raises:
        ValueError: The index does not fit the tokens, or a loss mask lies beside them.
    """

    def __init__(self, tokens_path: Path, index_path: Path) -> None:
        if (mask := tokens_path.with_name(tokens_path.name + ".loss")).exists():
            raise ValueError(
                f"{mask} says which tokens no loss is taken on, which is not read; take it away to "
                "learn all tokens, or tokenize anew with data.prompt_template"
            )
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
        """No document has a prompt, [num_documents]."""
        return np.zeros(self.num_documents, np.int32)
