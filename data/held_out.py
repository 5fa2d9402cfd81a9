"""What a model is judged by: the text that its corpora hold out, and what that is compared with."""

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from data.config import DataConfig, list_sources
from data.manifest import SplitRecord
from data.prepared_corpus import PreparedCorpus, open_verified
from data.samples import Samples, join_held_out
from data.unigram import Counts, load_counts


class HeldOut(NamedTuple):
    """The held-out text of all of a run's corpora, in a row."""

    samples: Samples
    train_counts: Counts  # how often each token occurs in what is trained on, [V]
    predicted: int  # how many of its tokens are a target
    text_bytes: int  # its size in UTF-8, prompts left out
    fingerprint: str  # of all of it


def open_held_out(
    config: DataConfig,
    *,
    tokenizer_fingerprint: str | None = None,
    corpora: Sequence[PreparedCorpus] | None = None,
) -> HeldOut:
    """What a model is judged by that is trained on the corpora of `config`, which may be open
    already.

    Raises:
        ValueError: See `open_corpora`, `TokenStream` and `Samples`.
        OSError: What lies behind a URL can't be read, and has no local copy.
    """
    if corpora is None:
        corpora = open_verified(config)
    records = [corpus.manifest.validation for corpus in corpora]
    masked = config.mask_documents
    return HeldOut(
        samples=join_held_out(corpora, config, tokenizer_fingerprint=tokenizer_fingerprint),
        train_counts=_blend_counts(config, corpora),
        predicted=sum(one.count_predicted(are_documents_masked=masked) for one in records),
        text_bytes=sum(record.text_bytes for record in records),
        fingerprint=_fingerprint(records),
    )


def _fingerprint(records: list[SplitRecord]) -> str:
    hashes = [record.fingerprint for record in records]
    hashes += [record.prompts.sha256 for record in records if record.prompts is not None]
    return sha256(" ".join(hashes).encode()).hexdigest()


def _blend_counts(config: DataConfig, corpora: Sequence[PreparedCorpus]) -> Counts:
    """Frequencies in what is trained on, the sources weighted as they are at the run's start."""
    splits = [corpus.manifest.train for corpus in corpora]
    own = [
        load_counts(corpus.find(split.unigram))
        for corpus, split in zip(corpora, splits, strict=True)
    ]
    if len(own) == 1:
        return own[0]
    total = sum(split.tokens for split in splits)
    weights = [source.weight for source in list_sources(config)]
    counts = np.zeros_like(own[0])
    for each, weight in zip(own, weights, strict=True):
        share = weight / sum(weights)
        counts += np.rint(each * (share * total / each.sum())).astype(np.int64)
    return counts
