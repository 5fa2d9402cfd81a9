"""How well token frequencies alone predict text: the loss that a model has to beat."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.shards import Shard, bin_path

COUNTED_AT_ONCE = 2**24  # tokens

Counts = npt.NDArray[np.int64]


def count_tokens(shards: Iterable[Path], *, vocab_size: int) -> Counts:
    """How often each id occurs in the shards, [vocab_size].

    Raises:
        ValueError: A shard holds an id that the vocabulary does not have.
    """
    counts = np.zeros(vocab_size, np.int64)
    for prefix in shards:
        tokens = Shard(prefix).tokens
        for start in range(0, len(tokens), COUNTED_AT_ONCE):
            piece = tokens[start : start + COUNTED_AT_ONCE]
            if (largest := int(piece.max())) >= vocab_size or piece.min() < 0:
                raise ValueError(
                    f"{bin_path(prefix)} holds the token {largest}, the tokenizer has only "
                    f"{vocab_size}; give the tokenizer that it was made with"
                )
            counts += np.bincount(piece, minlength=vocab_size)
    return counts


def load_counts(path: Path) -> Counts:
    """The counts that `prepare` kept for one split, in its file `unigram`, [vocab_size]."""
    counts: Counts = np.load(path)
    return counts


def unigram_cross_entropy(train_counts: Counts, validation_counts: Counts) -> float:
    """Nats per validation token under the training split's frequencies, each count plus one.

    Adding one keeps a token that training never saw from costing infinity. For a bound on a
    model's loss, count as validation tokens the targets that the model is judged by.
    """
    assert train_counts.shape == validation_counts.shape
    assert validation_counts.sum() > 0
    smoothed = train_counts.astype(np.float64) + 1
    log_probs = np.log(smoothed) - np.log(smoothed.sum())
    return float(-(validation_counts * log_probs).sum() / validation_counts.sum())
