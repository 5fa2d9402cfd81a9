"""A document on its way from its source to a shard."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Document(NamedTuple):
    """UTF-8 text, and the prompt before it that no loss is taken on."""

    text: bytes
    prompt: bytes | None = None  # None where the corpus has no prompts
    left_out: str | None = None  # why it is not stored; None of one that is

    @property
    def num_bytes(self) -> int:
        """Size of both."""
        return len(self.text) + len(self.prompt or b"")

    @property
    def whole(self) -> bytes:
        """Prompt and text."""
        return (self.prompt or b"") + self.text


Tokens = list[int] | npt.NDArray[np.int32]


class Prompted(NamedTuple):
    """Token ids of a document that begins with a prompt; bos belongs to the prompt."""

    prompt: Tokens
    answer: Tokens


Ids = Tokens | Prompted
"""A document's token ids as they are stored."""
