"""Trains a sentencepiece tokenizer on a sample that is spread evenly over the corpus."""

import io
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from heapq import heappop, heappush
from pathlib import Path

import sentencepiece

from data.atomic_file import write_aside
from data.tokenizer import BOS, EOS, FIM, PAD, TokenizerConfig

PASSAGE_CHARACTERS = 4096
TRAINING_THREADS = 4  # fixed: it is written into the model file, which must not depend on us


def cut_passages(text: str) -> Iterator[str]:
    """The text in consecutive pieces of at most 4096 characters, cut after newlines if it can."""
    start = 0
    while start < len(text):
        stop = start + PASSAGE_CHARACTERS
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def sample_passages(texts: Iterable[str], *, max_bytes: int) -> list[str]:
    """The passages with the smallest hashes, as many as fit into `max_bytes` of UTF-8.

    One pass with memory for the sample only; which passages are chosen depends on their text
    alone, not on their order or on how many there are. At least one is kept.
    """
    heap: list[tuple[int, str]] = []  # largest hash first
    size = 0
    for text in texts:
        for passage in cut_passages(text):
            encoded = passage.encode()
            digest = blake2b(encoded, digest_size=8, person=b"tokenizer").digest()
            heappush(heap, (-int.from_bytes(digest), passage))
            size += len(encoded)
            while size > max_bytes and len(heap) > 1:
                size -= len(heappop(heap)[1].encode())
    return [passage for _, passage in sorted(heap, reverse=True)]


def train_tokenizer(passages: list[str], config: TokenizerConfig, path: Path) -> None:
    """Writes a sentencepiece model to `path`.

    As DeepSeek's: text is taken as it is (no normalisation), every digit is a token of its own
    (arXiv:2401.02954, 2.1), unknown characters fall back to bytes. Runs of spaces may be tokens.

    Raises:
        ValueError: The text is too little for the vocabulary, or the vocabulary for the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(passages),
            model_writer=model,
            model_type=config.model_type.value,
            vocab_size=config.vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9995,
            max_sentence_length=4 * PASSAGE_CHARACTERS,  # UTF-8 bytes
            num_threads=TRAINING_THREADS,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=BOS,
            eos_piece=EOS,
            control_symbols=list(FIM),  # control symbols are never matched in text
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"data.tokenizer.vocab_size={config.vocab_size} does not suit this corpus; choose "
            f"another size or more text (data.tokenizer.train_bytes). sentencepiece says: {error}"
        ) from error
    with write_aside(path) as file:
        file.write(model.getvalue())
