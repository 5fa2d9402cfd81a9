"""Samples of a fixed length out of a token stream, in one order that never ends.

S = seq_len. Sample k of an epoch covers the stream's tokens k*S ... (k+1)*S inclusive: S inputs
and their targets, the last token shared with the next sample. The tail of the stream that fills
no sample is left out.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.config import DataConfig, find_folder
from data.manifest import Split
from data.permutation import Permutation
from data.token_stream import TokenStream

IGNORED = -100
"""Target of a place that no loss is taken at; torch's cross entropy leaves it out."""


class Sample(NamedTuple):
    """One sequence, arrays of [S]."""

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    is_real: npt.NDArray[np.bool_]  # False at padding
    document_lengths: list[int]  # attention segments, their sum is S


def pack(
    tokens: npt.NDArray[np.int64],
    borders: list[int],
    *,
    mask_documents: bool,
    reset_positions: bool,
) -> Sample:
    """A sample from S+1 tokens; `borders` are places in 1 ... S where a new document begins.

    A document that began before the sample is treated as if it began with it.
    """
    seq_len = len(tokens) - 1
    targets = tokens[1:].copy()
    starts = [0, *(border for border in borders if border < seq_len)]
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], seq_len], strict=True)]
    positions = np.arange(seq_len)
    if reset_positions:
        positions -= np.repeat(starts, lengths)
    if mask_documents:
        targets[[border - 1 for border in borders]] = IGNORED
    segments = lengths if mask_documents else [seq_len]
    return Sample(tokens[:-1], targets, positions, np.ones(seq_len, np.bool_), segments)


class Samples:
    """Sample k for any k >= 0, a pure function of (seed, k); every epoch has an order of its own.

    Raises:
        ValueError: The split does not fill one sample.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        seq_len: int,
        seed: int,
        shuffle: bool,
        mask_documents: bool,
        reset_positions: bool,
    ) -> None:
        self.num_samples = (len(stream) - 1) // seq_len
        """Samples per epoch."""
        if self.num_samples < 1:
            raise ValueError(
                f"data.seq_len={seq_len} needs {seq_len + 1} tokens, the split has {len(stream)}; "
                "choose a shorter data.seq_len, more data or another data.validation_fraction"
            )
        self.seq_len = seq_len
        self.tokenizer = stream.tokenizer
        self._stream = stream
        self._seed = seed
        self._shuffle = shuffle
        self._mask_documents = mask_documents
        self._reset_positions = reset_positions

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of the run, not of the epoch."""
        assert index >= 0
        start = self.place(index) * self.seq_len
        stop = start + self.seq_len + 1
        return pack(
            self._stream.read(start, stop),
            [place - start for place in self._stream.document_starts(start + 1, stop)],
            mask_documents=self._mask_documents,
            reset_positions=self._reset_positions,
        )

    def place(self, index: int) -> int:
        """Where in the stream sample `index` lies, counted in samples."""
        epoch, place = divmod(index, self.num_samples)
        if not self._shuffle:
            return place
        return Permutation(self.num_samples, key=f"{self._seed} {epoch}".encode())(place)

    def padding(self) -> Sample:
        """A sample without any target."""
        return Sample(
            tokens=np.full(self.seq_len, self.tokenizer.pad_id, np.int64),
            targets=np.full(self.seq_len, IGNORED, np.int64),
            positions=np.arange(self.seq_len),
            is_real=np.zeros(self.seq_len, np.bool_),
            document_lengths=[self.seq_len],
        )


def open_samples(
    config: DataConfig,
    split: Split,
    *,
    seed: int,
    tokenizer_fingerprint: str | None = None,
) -> Samples:
    """A split of the prepared corpus of `config`; only the training split is shuffled.

    Raises:
        ValueError: See `TokenStream` and `Samples`.
    """
    stream = TokenStream(
        find_folder(config),
        split,
        verify=config.verify,
        tokenizer_fingerprint=tokenizer_fingerprint,
    )
    return Samples(
        stream,
        seq_len=config.seq_len,
        seed=seed,
        shuffle=split is Split.train,
        mask_documents=config.mask_documents,
        reset_positions=config.reset_positions,
    )
