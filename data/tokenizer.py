"""Text to token ids and back, by sentencepiece or by Hugging Face `tokenizers`.

Markers (begin and end of sentence, padding, fill-in-the-middle) are ids that no text encodes to:
where a document spells a marker out, it is ordinary text. A tokenizer that is trained here is
lossless for every string that UTF-8 can hold; a given one is as lossless as its file makes it.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Protocol

import sentencepiece
import tokenizers

from data.atomic_file import hash_file

BOS, EOS, PAD = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>"
FIM = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")  # stand before prefix, suffix and middle

# What published tokenizers call their markers; the first name that is found wins.
BOS_NAMES = (BOS, "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")  # noqa: RUF001
EOS_NAMES = (EOS, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")  # noqa: RUF001
PAD_NAMES = (PAD, "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]")  # noqa: RUF001
FIM_NAMES = (
    FIM,
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)

# sentencepiece writes a space as U+2581, so a U+2581 of the text would come back as a space.
SPACE_MARK = "\u2581"


class ModelType(StrEnum):
    """The algorithm of a trained tokenizer."""

    bpe = "bpe"
    unigram = "unigram"


@dataclass(slots=True, kw_only=True)
class TokenizerConfig:
    """An existing tokenizer by its path, or how one is trained on the corpus."""

    #: A sentencepiece .model or Hugging Face tokenizer.json to use; none given: one is trained.
    path: str | None = None
    #: Tokens in a trained vocabulary, bytes and markers included.
    vocab_size: int = 8192
    #: Algorithm of a trained tokenizer: bpe or unigram.
    model_type: ModelType = ModelType.bpe
    #: UTF-8 bytes of text, spread over the whole corpus, that a tokenizer is trained on.
    train_bytes: int = 100_000_000


class FimIds(NamedTuple):
    """Ids of the fill-in-the-middle markers, named by what follows each of them."""

    prefix: int
    suffix: int
    middle: int


class Tokenizer(Protocol):
    """Text to ids and back; `fim` is None for a tokenizer without such markers."""

    size: int
    bos_id: int
    eos_id: int
    pad_id: int
    fim: FimIds | None
    fingerprint: str  # sha256 of the tokenizer's file

    def encode(self, text: str) -> list[int]:
        """The text's ids, without markers."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The ids' text; markers are left out."""
        ...


def check_tokenizer(config: TokenizerConfig) -> None:
    """Raises ValueError where the configuration cannot be met."""
    if config.path is not None:
        if not Path(config.path).expanduser().is_file():
            raise ValueError(
                f"data.tokenizer.path={config.path} is not a file; "
                "give a sentencepiece .model or a tokenizer.json, or null to train one"
            )
        return
    if config.vocab_size < 320:
        raise ValueError(
            f"data.tokenizer.vocab_size={config.vocab_size} must be at least 320: "
            "256 bytes, the markers and some text; choose e.g. 8192"
        )
    if config.train_bytes < 1:
        raise ValueError(
            f"data.tokenizer.train_bytes={config.train_bytes} must be positive; "
            "choose e.g. 100000000"
        )


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a sentencepiece `.model` or a Hugging Face `tokenizer.json`.

    Raises:
        ValueError: No such file, not a tokenizer, or one without bos or eos.
    """
    if not path.is_file():
        raise ValueError(f"there is no tokenizer at {path}; run prepare, or name an existing file")
    return HuggingFace(path) if path.suffix == ".json" else SentencePiece(path)


class SentencePiece:
    """A sentencepiece model."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
        model = self._model
        if model.bos_id() < 0 or model.eos_id() < 0:
            raise ValueError(
                f"{path} has no bos or no eos token; documents need both: use another tokenizer, "
                "or train one with bos_id and eos_id"
            )
        self.size: int = model.vocab_size()
        self.bos_id: int = model.bos_id()
        self.eos_id: int = model.eos_id()
        # Padding carries no target, so any id serves where the model has none for it.
        self.pad_id: int = model.pad_id() if model.pad_id() >= 0 else model.eos_id()
        ids = {
            name: model.piece_to_id(name)
            for names in FIM_NAMES
            for name in names
            if model.is_control(model.piece_to_id(name))
        }
        self.fim = _find_fim(ids)
        self.fingerprint = hash_file(path)
        mark_bytes = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = mark_bytes if all(map(model.is_byte, mark_bytes)) else None

    def encode(self, text: str) -> list[int]:
        if SPACE_MARK not in text or self._mark_ids is None:
            return list(self._model.encode(text))
        first, *others = text.split(SPACE_MARK)
        ids = list(self._model.encode(first))
        for other in others:
            ids += self._mark_ids
            ids += self._model.encode(other)
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))


class HuggingFace:
    """A `tokenizer.json` of Hugging Face `tokenizers`.

    Added tokens are markers and never match inside text, whatever the file says, except runs of
    whitespace, which some tokenizers add as a compact way to write indentation.
    """

    def __init__(self, path: Path) -> None:
        try:
            spec = json.loads(path.read_bytes())
            markers = [token for token in spec["added_tokens"] if token["content"].strip()]
            for token in markers:
                token["special"] = True
            self._model = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
        self._model.encode_special_tokens = True  # as text, not as the marker's id
        self._model.no_truncation()
        self._model.no_padding()
        ids = {token["content"]: int(token["id"]) for token in markers}
        self.size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = _find_marker(ids, BOS_NAMES, kind="bos", path=path)
        self.eos_id = _find_marker(ids, EOS_NAMES, kind="eos", path=path)
        # Padding carries no target, so any id serves where the file has none for it.
        self.pad_id = next((ids[name] for name in PAD_NAMES if name in ids), self.eos_id)
        self.fim = _find_fim(ids)
        self.fingerprint = hash_file(path)

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids, skip_special_tokens=True))


def _find_marker(ids: dict[str, int], names: tuple[str, ...], *, kind: str, path: Path) -> int:
    for name in names:
        if name in ids:
            return ids[name]
    raise ValueError(
        f"{path} has no {kind} token: none of its added_tokens is named {', '.join(names)}; "
        "add one to the file or use another tokenizer"
    )


def _find_fim(ids: dict[str, int]) -> FimIds | None:
    for prefix, suffix, middle in FIM_NAMES:
        if prefix in ids and suffix in ids and middle in ids:
            return FimIds(ids[prefix], ids[suffix], ids[middle])
    return None
