"""Evaluation of a run's checkpoint, apart from its training."""

from dataclasses import dataclass
from pathlib import Path

from data.batches import Batch
from data.config import read_alike
from data.credentials import refuse_credentials
from data.failure import ReadError
from data.held_out import open_held_out
from model.transformer import Sums
from train.checkpoint.restore import restore
from train.ema import Weights
from train.evaluation import Evaluation, evaluate
from train.ranks import alone
from train.read import DataError


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    #: Folder of the run whose model is judged.
    run_dir: str
    #: Step of the checkpoint; null takes the newest.
    step: int | None = None
    #: Its weights as trained, or their moving average (ema).
    weights: Weights = Weights.trained
    #: Folder or URL of a prepared corpus that is judged by instead of the run's own, such as one
    #: source of a mixture; it must have been made with the run's tokenizer.
    corpus: str | None = None
    #: Validation sequences to read; null reads the whole split.
    max_sequences: int | None = None


def evaluate_run(config: EvaluateConfig) -> Evaluation:
    """Loss, perplexity and bits per byte of the run's model on its validation split.

    Raises:
        ValueError: See `restore` and `open_held_out`.
    """
    if config.max_sequences is not None and config.max_sequences < 1:
        raise ValueError(
            f"max_sequences={config.max_sequences} must be at least 1, or null for all"
        )
    if config.corpus is not None:
        refuse_credentials("corpus", config.corpus)
    ranks = alone()
    restored = restore(Path(config.run_dir), ranks=ranks, step=config.step, weights=config.weights)
    data, device = restored.config.data, ranks.device
    if config.corpus is not None:
        data = read_alike(data, config.corpus)
    held_out = open_held_out(data, tokenizer_fingerprint=restored.tokenizer.fingerprint)

    def forward(batch: Batch) -> Sums:
        return restored.model(
            batch.tokens.to(device),
            batch.targets.to(device),
            batch.positions.to(device),
            batch.is_real.to(device),
            segments=batch.document_lengths,
        )

    try:
        return evaluate(
            forward,
            held_out,
            ranks=ranks,
            micro_batch_size=restored.config.parallel.micro_batch_size,
            max_sequences=config.max_sequences,
        )
    except DataError as error:
        raise ReadError("; ".join(error.failures.values())) from error
