"""Tokenizer files as Meta published them for Llama 2 and 3: built here by the same settings."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import Sequence as Processors
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from data.config import FilesData
from data.manifest import Split
from data.prepare import prepare
from data.token_stream import TokenStream
from data.tokenizer import HuggingFace, TokenizerConfig
from tests.data.test_tokenizer import HOSTILE, TEXT

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3_MARKERS = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
    *("<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
    *("<|eot_id|>", "<|python_tag|>"),
]
LLAMA_2_MARKERS = ["<unk>", "<s>", "</s>"]


def make_llama_3(path: Path) -> None:
    """Byte-level BPE: a regex cuts words, a word that is a token stays one, no prefix space."""
    model = Tokenizer(models.BPE(ignore_merges=True))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([TEXT + "1234567 2024 199"], trainer)
    model.add_special_tokens([AddedToken(name, normalized=False) for name in LLAMA_3_MARKERS])
    bos = LLAMA_3_MARKERS[0]
    template = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, model.token_to_id(bos))]
    )
    model.post_processor = Processors([ByteLevelProcessor(trim_offsets=True), template])
    model.save(str(path))


def make_llama_2(path: Path) -> None:
    """sentencepiece's BPE: spaces as U+2581, one put before the text; what is unknown is bytes."""
    model = Tokenizer(models.BPE())
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # for training alone
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=800, special_tokens=LLAMA_2_MARKERS + bytes_, show_progress=False
    )
    model.train_from_iterator([TEXT], trainer)
    trained = tokenizers.Tokenizer.from_str(model.to_str())
    vocab = trained.get_vocab()
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    model = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    model.normalizer = trained.normalizer
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    model.add_special_tokens([AddedToken(name, normalized=False) for name in LLAMA_2_MARKERS])
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.save(str(path))


MAKERS = {"llama 2": make_llama_2, "llama 3": make_llama_3}


@pytest.fixture(scope="module", params=list(MAKERS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    MAKERS[request.param](path)
    return path


def is_llama_2(path: Path) -> bool:
    return HuggingFace(path).bos_id == 1


def test_the_markers_are_found(path: Path) -> None:
    tokenizer, file = HuggingFace(path), Tokenizer.from_file(str(path))
    names = LLAMA_2_MARKERS[1:] if is_llama_2(path) else LLAMA_3_MARKERS[:2]
    assert [tokenizer.bos_id, tokenizer.eos_id] == [file.token_to_id(name) for name in names]
    pad = "</s>" if is_llama_2(path) else "<|finetune_right_pad_id|>"
    assert tokenizer.pad_id == file.token_to_id(pad)
    assert tokenizer.fim is None
    assert tokenizer.size == file.get_vocab_size()


@pytest.mark.parametrize("text", [*HOSTILE, TEXT, "".join(LLAMA_3_MARKERS), "<s></s>", "x <s>y"])
def test_text_comes_back_and_has_no_markers(path: Path, text: str) -> None:
    tokenizer = HuggingFace(path)
    file = Tokenizer.from_file(str(path))
    ids = tokenizer.encode(text)
    markers = {file.token_to_id(name) for name in LLAMA_2_MARKERS + LLAMA_3_MARKERS}
    assert markers.isdisjoint(ids)
    # sentencepiece's own sign for a space can't be told from one.
    assert tokenizer.decode(ids) == (text.replace("▁", " ") if is_llama_2(path) else text)


@pytest.mark.parametrize("text", ["hello  world", "it's 12345 o'clock\n\n\tdef f(x):", "über 猫😀"])
def test_ids_are_those_of_the_file(path: Path, text: str) -> None:
    file = Tokenizer.from_file(str(path))
    assert HuggingFace(path).encode(text) == file.encode(text, add_special_tokens=False).ids


def test_llama_3_cuts_digits_in_threes_and_llama_2_puts_a_space_first(path: Path) -> None:
    tokenizer, file = HuggingFace(path), Tokenizer.from_file(str(path))
    if is_llama_2(path):
        assert file.id_to_token(tokenizer.encode("while")[0]).startswith("▁")
        assert file.encode("猫", add_special_tokens=False).tokens[1:] == [
            "<0xE7>",
            "<0x8C>",
            "<0xAB>",
        ]
    else:
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode("1234567")]
        assert all(len(piece) <= 3 for piece in pieces)
        assert tokenizer.decode(tokenizer.encode("while")) == "while"


def test_documents_begin_with_one_bos_and_end_with_eos(path: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    texts = [f"text {number}, {'<s> and <|begin_of_text|> ' * number}" for number in range(20)]
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number:02}.txt").write_text(text)
    config = FilesData(
        folder=str(tmp_path / "corpus"),
        paths=[f"{tmp_path}/text/*.txt"],
        tokenizer=TokenizerConfig(path=str(path)),
        validation_fraction=0.3,
        processes=1,
    )
    manifest = prepare(config).manifest
    tokenizer = HuggingFace(path)
    found: list[str] = []
    for split in Split:
        stream = TokenStream(Path(config.folder), split, verify=config.verify)
        starts = [*stream.document_starts(0, len(stream)), len(stream)]
        for start, stop in pairwise(starts):
            ids = stream.read(start, stop).tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert tokenizer.bos_id not in ids[1:]
            found.append(tokenizer.decode(ids))
    assert sorted(found) == sorted(texts)
    assert manifest.tokenizer.bos_id == tokenizer.bos_id
