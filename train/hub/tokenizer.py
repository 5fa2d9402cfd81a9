"""The tokenizer in a Hugging Face folder: ours as a tokenizer.json, given ones as they were.

sentencepiece writes a space as U+2581 in its pieces. In the tokenizer.json pieces hold real
spaces: no normaliser is needed, and a U+2581 of the text, unknown to the vocabulary, becomes its
bytes, as it does here (`data.tokenizer`).
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as spm

from data.atomic_file import write_json
from data.config import DataConfig
from data.prepare import tokenizer_path
from data.tokenizer import SPACE_MARK, Tokenizer, load_tokenizer

JSON, MODEL = "tokenizer.json", "tokenizer.model"
CONFIG = "tokenizer_config.json"
# What belongs to a tokenizer in a published folder, besides the file that `data` reads.
COMPANIONS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def find_tokenizer(data: DataConfig) -> Path:
    """The corpus' tokenizer, or the given one as long as there is no corpus.

    Raises:
        ValueError: There is neither.
    """
    path = tokenizer_path(data)
    if path.is_file():
        return path
    if data.tokenizer.path is not None:
        return Path(data.tokenizer.path).expanduser()
    raise ValueError(f"there is no tokenizer at {path}; prepare the run's corpus first")


def export_tokenizer(data: DataConfig, out: Path, *, max_seq_len: int) -> str:
    """Write the tokenizer's files; says what can't be done with them, or nothing."""
    path = find_tokenizer(data)
    tokenizer = load_tokenizer(path)
    if path.suffix == ".json":
        shutil.copyfile(path, out / JSON)
        if data.tokenizer.path is not None:
            copy_companions(Path(data.tokenizer.path).expanduser().parent, out)
    else:
        shutil.copyfile(path, out / MODEL)
        model = spm.ModelProto.FromString(path.read_bytes())
        obstacle = find_obstacle(model)
        if obstacle:
            return f"{MODEL} was not converted to {JSON}: {obstacle}"
        (out / JSON).write_text(json.dumps(to_json(model, bos_id=tokenizer.bos_id)))
    if not (out / CONFIG).exists():
        write_json(out / CONFIG, _describe(out / JSON, tokenizer, max_seq_len=max_seq_len))
    return ""


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files beside a published tokenizer, those that exist."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def find_obstacle(model: Any) -> str:
    """What of a sentencepiece model has no equal in a tokenizer.json as written here, or nothing.

    Tokenizers that are trained here with model_type=bpe have nothing of the kind.
    """
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        # sentencepiece adds up a unigram model's scores in fp32, tokenizers in fp64: where two ways
        # to cut a text are nearly as likely they choose differently (0.23.3).
        return "it is not BPE, and tokenizers may choose another of equally likely ways to cut"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        return "it normalises text"
    if normalizer.add_dummy_prefix:
        return "it puts a space before the text"
    if not trainer.byte_fallback:
        return "it has no bytes for unknown characters"
    if any(piece.type == piece.USER_DEFINED for piece in model.pieces):
        return "it has user-defined symbols"
    return ""


def to_json(model: Any, *, bos_id: int) -> dict[str, Any]:
    """The sentencepiece model as a tokenizer.json that encodes alike and puts bos first."""
    pieces = [_spell(piece) for piece in model.pieces]
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN)
    markers = [
        {"id": i, "content": piece.piece, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, piece in enumerate(model.pieces)
        if piece.type in (piece.CONTROL, piece.UNKNOWN)
    ]
    bos = pieces[bos_id]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": markers,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos), _sequence("A")],
            "pair": [_special(bos), _sequence("A"), _sequence("B")],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": _bpe(model, pieces, unknown),
    }


def _bpe(model: Any, pieces: list[str], unknown: int) -> dict[str, Any]:
    """sentencepiece merges the neighbours whose piece has the best score; here pairs have ranks.

    Each way to cut a piece in two pieces becomes a merge, at the rank of the piece.
    """
    scores = {
        text: piece.score
        for text, piece in zip(pieces, model.pieces, strict=True)
        if piece.type == piece.NORMAL
    }
    merges: list[list[str]] = []
    for text in sorted(scores, key=lambda text: -scores[text]):
        cuts = [(text[:i], text[i:]) for i in range(len(text) - 1, 0, -1)]
        merges += [[left, right] for left, right in cuts if left in scores and right in scores]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {text: i for i, text in enumerate(pieces)},
        "merges": merges,
    }


def _spell(piece: Any) -> str:
    is_text = piece.type == piece.NORMAL
    return str(piece.piece.replace(SPACE_MARK, " ") if is_text else piece.piece)


def _special(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


def _describe(path: Path, tokenizer: Tokenizer, *, max_seq_len: int) -> dict[str, Any]:
    """A tokenizer_config.json. Markers in a text stay text, as they do in training."""
    names = {
        token["id"]: token["content"] for token in json.loads(path.read_text())["added_tokens"]
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "pad_token": names[tokenizer.pad_id],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
