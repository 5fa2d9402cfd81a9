"""Sequence parallelism: each rank of a sequence group holds a part of every sequence.

Attention exchanges heads for tokens and back (DeepSpeed Ulysses, arXiv:2309.14509): between the
two messages a rank has all tokens of 1/N of the heads. Everything else works token by token; only
the balance loss needs each sequence's counts, which are added over the group.
"""

from data.batches import Batch


def cut(batch: Batch, part: int, *, parts: int, ahead: int) -> Batch:
    """One of `parts` equal parts of every sequence, as the model takes it.

    Tokens, targets and `is_real` go on for up to `ahead` places into the next part, so that MTP's
    depths look across the border. `document_lengths` stay those of whole sequences.
    """
    seq_len = batch.tokens.shape[1]
    assert seq_len % parts == 0, "check_layout asks for it"
    start, stop = part * seq_len // parts, (part + 1) * seq_len // parts
    return batch._replace(
        tokens=batch.tokens[:, start : stop + ahead],
        targets=batch.targets[:, start : stop + ahead],
        positions=batch.positions[:, start:stop],
        is_real=batch.is_real[:, start : stop + ahead],
    )
