"""Held-out text in samples of a fixed length, in the order in which it lies in the stream.

S = seq_len. Sample k covers the stream's tokens k*S ... (k+1)*S inclusive: S inputs and their
targets, the last token shared with the next sample. The tail of the stream that fills no sample is
left out. (What is trained on has an order of its own: `data/mixture.py`.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.config import DataConfig
from data.joined_split import JoinedSplit, Part
from data.manifest import Split
from data.prepared_corpus import PreparedCorpus, open_corpora
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
        split: JoinedSplit,
        *,
        seq_len: int,
        mask_documents: bool,
        reset_positions: bool,
        patience: RetryConfig | None = None,
    ) -> None:
        """Without `patience` a read that fails is not tried again."""
        self.num_samples = (len(split) - 1) // seq_len
        if self.num_samples < 1:
            raise ValueError(
                f"data.seq_len={seq_len} needs {seq_len + 1} tokens, the split has {len(split)}; "
                "choose a shorter data.seq_len, more data or another data.validation_fraction"
            )
        self.seq_len = seq_len
        self.tokenizer = split.tokenizer
        self._split = split
        self._mask_documents = mask_documents
        self._reset_positions = reset_positions
        self._patience = patience or RetryConfig(attempts=1)

    def __getitem__(self, number: int) -> Sample:
        """Raises OSError where a shard can't be read, often enough in a row; it is named."""
        return retry(lambda: self._read(number), self._patience, forget=self._split.close)

    def _read(self, number: int) -> Sample:
        assert 0 <= number < self.num_samples
        start = number * self.seq_len
        stop = start + self.seq_len + 1
        borders = [place - start for place in self._split.document_starts(start + 1, stop)]
        sample = pack(
            self._split.read(start, stop),
            borders,
            mask_documents=self._mask_documents,
            reset_positions=self._reset_positions,
        )
        for first, end in self._split.prompts(start, stop):
            sample.targets[max(first - start, 0) : max(end - 1 - start, 0)] = IGNORED
        hidden = self._split.hidden(start + 1, stop) - start
        sample.targets[np.setdiff1d(hidden, borders) - 1] = IGNORED  # first tokens: see `pack`
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
    """The validation splits of the prepared corpora of `config`, one after another. What lies
    behind a URL is copied when it is read.

    Raises:
        ValueError: See `open_corpora`, `TokenStream` and `Samples`.
        OSError: What lies behind a URL can't be read, and has no local copy.
    """
    corpora = open_corpora(config)
    return join_held_out(corpora, config, tokenizer_fingerprint=tokenizer_fingerprint)


def join_held_out(
    corpora: Sequence[PreparedCorpus], config: DataConfig, *, tokenizer_fingerprint: str | None
) -> Samples:
    """The same, of opened corpora."""
    parts = []
    for corpus in corpora:
        stream = TokenStream(
            corpus.folder,
            Split.validation,
            verify=config.verify,
            tokenizer_fingerprint=tokenizer_fingerprint,
            remote=corpus.remote,
        )
        has_prompts = corpus.manifest.validation.prompts is not None
        parts.append(Part(stream, corpus.open_index(Split.validation) if has_prompts else None))
    return Samples(
        JoinedSplit(parts),
        seq_len=config.seq_len,
        mask_documents=config.mask_documents,
        reset_positions=config.reset_positions,
        patience=config.retry,
    )
