"""How well a model predicts held-out text."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.batches import Batch, validation_batches
from data.held_out import HeldOut
from data.samples import IGNORED
from data.unigram import unigram_cross_entropy
from model.transformer import Sums
from train.ranks import Ranks
from train.read import read_together


@dataclass(slots=True, kw_only=True)
class EvaluationConfig:
    #: Steps between evaluations during training; there is always one at the end.
    every: int = 1000
    #: Validation sequences read at each; null reads the whole split.
    max_sequences: int | None = None


def check_evaluation(config: EvaluationConfig) -> None:
    """Refuse, with a ValueError, an evaluation of nothing."""
    if config.every < 1:
        raise ValueError(f"evaluation.every={config.every} must be at least 1")
    if config.max_sequences is not None and config.max_sequences < 1:
        raise ValueError(
            f"evaluation.max_sequences={config.max_sequences} must be at least 1, or null for all"
        )


class Evaluation(NamedTuple):
    """Losses are in nats per predicted token."""

    loss: float
    perplexity: float
    bits_per_byte: float  # of the text's UTF-8 bytes
    targets: int
    unigram_entropy: float  # the same targets under the training split's token frequencies


class Measured(NamedTuple):
    """What a share of the batches adds up to."""

    nats: float  # of this rank's part of each sequence
    target_counts: npt.NDArray[np.int64]  # how often each token was a target [V], whole sequences


def evaluate(
    forward: Callable[[Batch], Sums],
    held_out: HeldOut,
    *,
    ranks: Ranks,
    micro_batch_size: int,
    max_sequences: int | None,
) -> Evaluation:
    """The evaluation over all ranks' shares of the held-out text; the same on every rank.

    Raises:
        DataError: A share can't be read; on all ranks.
    """
    batches = validation_batches(
        held_out.samples,
        rank=ranks.replica,
        world=ranks.num_replicas,
        micro_batch_size=micro_batch_size,
        limit=max_sequences,
    )
    vocab_size = len(held_out.train_counts)
    share = _measure(forward, read_together(batches, ranks), vocab_size=vocab_size)
    shares = ranks.gather(share)
    every_rank = np.sum([share.target_counts for share in shares], axis=0)
    target_counts = every_rank // ranks.ranks_per_replica
    targets = int(target_counts.sum())
    loss = sum(share.nats for share in shares) / targets
    predicted_per_byte = held_out.predicted / held_out.text_bytes
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=loss / math.log(2) * predicted_per_byte,
        targets=targets,
        unigram_entropy=unigram_cross_entropy(held_out.train_counts, target_counts),
    )


@torch.no_grad()
def _measure(
    forward: Callable[[Batch], Sums], batches: Iterable[Batch], *, vocab_size: int
) -> Measured:
    nats: float | Tensor = 0.0  # stays on the device until all batches are through
    counts = np.zeros(vocab_size, np.int64)
    for batch in batches:
        nats = nats + forward(batch).loss.double()
        kept = batch.targets[batch.targets != IGNORED]
        counts += np.bincount(kept.numpy(), minlength=vocab_size)
    return Measured(float(nats), counts)
