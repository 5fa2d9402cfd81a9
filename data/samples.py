"""Held-out text in samples of a fixed length, in the order in which it lies in the stream.

S = seq_len. Sample k covers the stream's tokens k*S ... (k+1)*S inclusive: S inputs and their
targets, the last token shared with the next sample. The tail of the stream that fills no sample is
left out. (What is trained on has an order of its own: `data/mixture.py`.)
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.config import DataConfig, find_folder
from data.documents import MappedIndex
from data.manifest import Split, read_manifest
from data.mirror import is_remote
from data.remote import bring_here, open_remote
from data.retry import RetryConfig, retry
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
    """Sample k of a split.

    Raises:
        ValueError: The split does not fill one sample.
    """

    def __init__(
        self,
        stream: TokenStream,
        index: MappedIndex | None = None,
        *,
        seq_len: int,
        mask_documents: bool,
        reset_positions: bool,
        patience: RetryConfig | None = None,
    ) -> None:
        """`index` is needed where documents have prompts; without `patience` a read that fails is
        not tried again."""
        self.num_samples = (len(stream) - 1) // seq_len
        if self.num_samples < 1:
            raise ValueError(
                f"data.seq_len={seq_len} needs {seq_len + 1} tokens, the split has {len(stream)}; "
                "choose a shorter data.seq_len, more data or another data.validation_fraction"
            )
        self.seq_len = seq_len
        self.tokenizer = stream.tokenizer
        self._stream = stream
        self._index = index
        self._mask_documents = mask_documents
        self._reset_positions = reset_positions
        self._patience = patience or RetryConfig(attempts=1)

    def __getitem__(self, number: int) -> Sample:
        """Raises OSError where a shard can't be read, often enough in a row; it is named."""
        return retry(lambda: self._read(number), self._patience, forget=self._stream.close)

    def _read(self, number: int) -> Sample:
        assert 0 <= number < self.num_samples
        start = number * self.seq_len
        stop = start + self.seq_len + 1
        sample = pack(
            self._stream.read(start, stop),
            [place - start for place in self._stream.document_starts(start + 1, stop)],
            mask_documents=self._mask_documents,
            reset_positions=self._reset_positions,
        )
        if self._index is not None:
            spans = self._index.find(self._index.find_overlapping(start, stop))
            ends = spans.starts + spans.prompts - 1 - start
            for first, end in zip((spans.starts - start).tolist(), ends.tolist(), strict=True):
                sample.targets[max(first, 0) : max(end, 0)] = IGNORED
        return sample

    def padding(self) -> Sample:
        """A sample without any target."""
        return Sample(
            tokens=np.full(self.seq_len, self.tokenizer.pad_id, np.int64),
            targets=np.full(self.seq_len, IGNORED, np.int64),
            positions=np.arange(self.seq_len),
            is_real=np.zeros(self.seq_len, np.bool_),
            document_lengths=[self.seq_len],
        )


def open_samples(config: DataConfig, *, tokenizer_fingerprint: str | None = None) -> Samples:
    """The validation split of the prepared corpus of `config`.

    Raises:
        ValueError: See `TokenStream`, `Samples` and `RemoteCorpus.bring`.
        OSError: What lies behind a URL can't be read, and has no local copy.
    """
    bring_here(config)
    folder = find_folder(config)
    stream = TokenStream(
        folder,
        Split.validation,
        verify=config.verify,
        tokenizer_fingerprint=tokenizer_fingerprint,
        remote=open_remote(config.folder, config) if is_remote(config.folder) else None,
    )
    record = read_manifest(folder).validation
    index = None
    if record.prompts is not None:
        assert record.index is not None
        index = MappedIndex(folder / record.index.name, folder / record.prompts.name)
    return Samples(
        stream,
        index,
        seq_len=config.seq_len,
        mask_documents=config.mask_documents,
        reset_positions=config.reset_positions,
        patience=config.retry,
    )
