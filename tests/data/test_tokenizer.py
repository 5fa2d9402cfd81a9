"""Tokenizers are lossless, and no text encodes to a marker."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import (
    FIM,
    ModelType,
    Tokenizer,
    TokenizerConfig,
    check_tokenizer,
    load_tokenizer,
)
from data.train_tokenizer import cut_passages, sample_passages, train_tokenizer

# A corpus that is itself full of markers must not teach the tokenizer to produce them.
TEXT = inspect.getsource(textwrap) + "".join(FIM) * 20 + "<s></s><0x41>" * 20 + "a▁b  \t\r\n" * 9
HOSTILE = ["", " ", "  x", "a▁b", "▁", "▁▁ ▁", "\0", "a\0b", "\r\n\t\t  x \n", " ⁇ ", "<0x41>"]
HOSTILE += [
    "<unk>",
    "<s>",
    "<|pad|>",
    "<|EOT|>",
    "".join(FIM),
    "😀🤷🏽‍♀️",
    "\ufeff\ufffd",
    "\x7f\x80\u2028",
]
HOSTILE += ["1234567890", "ø", "    indented"]


@pytest.fixture(scope="module")
def trained_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizer")
    paths: dict[str, Path] = {kind: folder / f"{kind}.model" for kind in ModelType}
    for kind in ModelType:
        config = TokenizerConfig(vocab_size=420, model_type=kind)
        train_tokenizer(list(cut_passages(TEXT)), config, paths[kind])
    return paths


@pytest.fixture
def trained(trained_paths: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(trained_paths["bpe"])


@pytest.fixture(scope="module")
def hugging_face_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with every kind of added token, a post-processor and a truncation."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    model.train_from_iterator([TEXT], trainer)
    model.add_tokens([tokenizers.AddedToken(name, special=False) for name in (*FIM, "<|EOT|>")])
    model.add_tokens([tokenizers.AddedToken("    ", normalized=True)])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    model.enable_truncation(16)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="module", params=[*ModelType, "hugging_face"])
def tokenizer(
    request: pytest.FixtureRequest, hugging_face_path: Path, trained_paths: dict[str, Path]
) -> Tokenizer:
    return load_tokenizer(trained_paths.get(request.param, hugging_face_path))


def markers(tokenizer: Tokenizer) -> set[int]:
    assert tokenizer.fim is not None
    return {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.fim}


@pytest.mark.parametrize("text", [*HOSTILE, TEXT])
def test_hostile_text_comes_back_and_has_no_markers(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert markers(tokenizer).isdisjoint(ids)
    assert all(0 <= token < tokenizer.size for token in ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.one_of(st.sampled_from("▁ \n\t\r\0<|>_1a"), st.characters(codec="utf-8"))))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert markers(tokenizer).isdisjoint(ids)


def test_markers_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*markers(tokenizer)]) == ""


def test_a_trained_tokenizer_has_its_size_and_six_markers(trained: Tokenizer) -> None:
    assert trained.size == 420
    assert len(markers(trained)) == 6


def test_every_digit_is_a_token_of_its_own(trained: Tokenizer) -> None:
    assert [trained.decode([token]) for token in trained.encode("3141")] == list("3141")


@pytest.mark.parametrize("kind", list(ModelType))
def test_tokens_keep_to_the_rules_of_the_docs(
    kind: ModelType, trained_paths: dict[str, Path]
) -> None:
    """Letters stand with nothing but one space before them; digits stand alone."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained_paths[kind]))
    ordinary = [
        model.id_to_piece(token)
        for token in range(model.vocab_size())
        if not (model.is_byte(token) or model.is_control(token) or model.is_unknown(token))
    ]
    for piece in ordinary:
        assert not any(map(str.isdigit, piece)) or len(piece) == 1
        if any(map(str.isalpha, piece)):
            assert re.fullmatch(r"▁?[^\W\d_]+", piece)
        assert "▁" not in piece.lstrip("▁")  # spaces begin a piece or are all of it
    assert any("\n" in piece and len(piece) > 1 for piece in ordinary)  # punctuation may join them


def test_indentation_takes_few_tokens(trained: Tokenizer) -> None:
    assert len(trained.encode(" " * 16)) <= 4


@pytest.mark.parametrize("model_type", list(ModelType))
def test_training_twice_gives_the_same_file(model_type: ModelType, tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=420, model_type=model_type)
    for name in ("first", "second"):
        train_tokenizer(list(cut_passages(TEXT)), config, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_tokenizer_without_bos_is_refused_with_the_names_looked_for(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.add_special_tokens(["<eos>"])
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no bos token.*<\|begin_of_text\|>.*another tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} is not a"):
        load_tokenizer(tmp_path / name)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path=.*none\.model is not a file"):
        check_tokenizer(TokenizerConfig(path=str(tmp_path / "none.model")))


def test_a_vocabulary_too_large_for_the_text_is_refused(tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=50_000)
    with pytest.raises(ValueError, match=r"data\.tokenizer\.vocab_size=50000 does not suit"):
        train_tokenizer(["a few words only"], config, tmp_path / "tokenizer.model")
    assert list(tmp_path.iterdir()) == []


@given(text=st.text(st.sampled_from("a\n"), max_size=20_000))
@settings(max_examples=20, deadline=None)
def test_passages_are_the_text_in_short_pieces(text: str) -> None:
    passages = list(cut_passages(text))
    assert "".join(passages) == text
    assert all(0 < len(passage) <= 4096 for passage in passages)


def test_the_sample_depends_on_the_passages_but_not_on_their_order() -> None:
    texts = [f"document {number}" for number in range(1000)]
    sample = sample_passages(texts, max_bytes=1000)
    assert sample == sample_passages(reversed(texts), max_bytes=1000)
    assert 950 < sum(len(text.encode()) for text in sample) <= 1000
    thirds = {int(text.split()[1]) // 334 for text in sample}
    assert thirds == {0, 1, 2}  # spread over the whole corpus


def test_the_sample_keeps_at_least_one_passage() -> None:
    assert sample_passages(["longer than that"], max_bytes=3) == ["longer than that"]
    assert sample_passages([], max_bytes=3) == []
