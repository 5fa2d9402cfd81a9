"""Exported tokenizers encode exactly as ours, on real text and on what is hard."""

import json
import random
from pathlib import Path

import pytest
import transformers
from sentencepiece import sentencepiece_model_pb2 as spm

from data.config import FilesData
from data.prepare import tokenizer_path
from data.tokenizer import ModelType, TokenizerConfig, load_tokenizer
from data.train_tokenizer import sample_passages, train_tokenizer
from train.hub.tokenizer import export_tokenizer, find_obstacle, to_json

SOURCES = [path.read_text() for path in sorted(Path(__file__).parents[2].rglob("*.py"))]
HARD = [
    "",
    " ",
    "\n\n\t\t  x\r\n",
    "a  b   c    d     e      f       g" + " " * 77,
    ("    " * 5 + "\n") * 4,
    "▁ a▁▁ b ▁",
    "<0x41> <0x0A><unk>",
    "<|begin_of_sentence|>marker<|fim_hole|>",
    "日本語 🎉👩‍👩‍👧 e\u0301 ﬁ Å \u00a0x\u3000y \u200b\ufeff",
    "0123456789 3.14159 1e-05",
    "\x00\x01\ud7ff",
    "aaaaaaaaaaaaaaaaaaaaaa = = ==== ========",
]


def random_texts() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(" \n\tab=_-09é▁🎉", k=200)) for _ in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus' folder with nothing but a trained tokenizer, with merges of several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    passages = sample_passages(SOURCES, max_bytes=300_000)
    train_tokenizer(passages, TokenizerConfig(vocab_size=1500), folder / "tokenizer.model")
    return folder


def test_auto_tokenizer_encodes_and_decodes_as_ours(folder: Path, tmp_path: Path) -> None:
    data = FilesData(folder=str(folder), paths=["*"])
    assert export_tokenizer(data, tmp_path, max_seq_len=99) == ""
    ours = load_tokenizer(tokenizer_path(data))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SOURCES, *HARD, *random_texts()]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == text
    assert theirs.encode("a b") == [ours.bos_id, *ours.encode("a b")]
    markers = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert markers == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert theirs.model_max_length == 99


def test_the_exported_file_is_a_tokenizer_of_ours_too(folder: Path, tmp_path: Path) -> None:
    data = FilesData(folder=str(folder), paths=["*"])
    export_tokenizer(data, tmp_path, max_seq_len=99)
    ours, again = load_tokenizer(tokenizer_path(data)), load_tokenizer(tmp_path / "tokenizer.json")
    for text in [*HARD, *random_texts()]:
        assert again.encode(text) == ours.encode(text)
    assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert again.fim == ours.fim


def test_a_given_tokenizer_json_goes_out_as_it_came_in(folder: Path, tmp_path: Path) -> None:
    given, corpus, out = (tmp_path / name for name in ("given", "corpus", "out"))
    for path in (given, corpus, out):
        path.mkdir()
    model = spm.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    text = json.dumps(to_json(model, bos_id=1))
    (given / "tokenizer.json").write_text(text)
    (given / "tokenizer_config.json").write_text('{"chat": "own"}')
    (corpus / "tokenizer.json").write_text(text)
    config = TokenizerConfig(path=str(given / "tokenizer.json"))
    data = FilesData(folder=str(corpus), paths=["*"], tokenizer=config)
    assert export_tokenizer(data, out, max_seq_len=99) == ""
    assert (out / "tokenizer.json").read_text() == text
    assert (out / "tokenizer_config.json").read_text() == '{"chat": "own"}'


def test_a_unigram_model_is_left_as_it_is(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    out.mkdir()
    config = TokenizerConfig(vocab_size=500, model_type=ModelType.unigram)
    passages = sample_passages(SOURCES, max_bytes=30_000)
    train_tokenizer(passages, config, corpus / "tokenizer.model")
    data = FilesData(folder=str(corpus), paths=["*"], tokenizer=config)
    assert "it is not BPE" in export_tokenizer(data, out, max_seq_len=99)
    assert [path.name for path in out.iterdir()] == ["tokenizer.model"]


def test_a_model_that_normalises_text_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    model = spm.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    assert find_obstacle(model) == ""
    model.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    out = tmp_path / "out"
    out.mkdir()
    note = export_tokenizer(FilesData(folder=str(tmp_path), paths=["*"]), out, max_seq_len=9)
    assert "it puts a space before the text" in note
    assert [path.name for path in out.iterdir()] == ["tokenizer.model"]
