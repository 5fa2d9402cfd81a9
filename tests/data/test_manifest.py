"""No flipped bit, lost file or foreign shard gets past the manifest."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import FilesData, Verify
from data.manifest import Split, read_manifest, verify_corpus
from data.prepare import Prepared, prepare
from data.token_stream import TokenStream
from data.tokenizer import TokenizerConfig

ConfigMaker = Callable[..., FilesData]


@pytest.fixture
def corpus(prepared: Prepared, tmp_path: Path) -> Path:
    """A copy of the small corpus, to be damaged."""
    return shutil.copytree(prepared.folder, tmp_path / "corpus")


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        *("train-00001.bin", "validation-00001.idx", "tokenizer.model", "unigram-train.npy"),
        "documents-train.i64",
    ],
)
@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_flipped_bit_is_found_and_the_file_named(corpus: Path, name: str, place: int) -> None:
    flip_bit(corpus / name, place)
    with pytest.raises(ValueError, match=f"{name} does not match its sha256"):
        verify_corpus(corpus, read_manifest(corpus), verify=Verify.full)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(corpus: Path) -> None:
    size = (corpus / "manifest.json").stat().st_size
    for place in range(0, size - 1, size // 50):
        flip_bit(corpus / "manifest.json", place)
        if (corpus / "manifest.json").read_bytes()[place : place + 1].isspace():
            flip_bit(corpus / "manifest.json", place)
            continue  # layout, not content
        with pytest.raises(ValueError, match=r"manifest\.json|no finished corpus"):
            read_manifest(corpus)
        flip_bit(corpus / "manifest.json", place)
    read_manifest(corpus)


@pytest.mark.parametrize("verify", list(Verify))
def test_a_file_cut_short_is_found_by_its_size(corpus: Path, verify: Verify) -> None:
    path = corpus / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train-00000\.bin has \d+ bytes, manifest\.json says"):
        TokenStream(corpus, Split.train, verify=verify)


@pytest.mark.parametrize("verify", list(Verify))
def test_a_missing_file_is_named(corpus: Path, verify: Verify) -> None:
    (corpus / "validation-00001.idx").unlink()
    with pytest.raises(ValueError, match=r"validation-00001\.idx is missing"):
        TokenStream(corpus, Split.train, verify=verify)


def test_a_shard_of_another_tokenizer_is_refused(
    corpus: Path, make_config: ConfigMaker, tmp_path: Path
) -> None:
    other = prepare(make_config(tmp_path / "other", tokenizer=TokenizerConfig(vocab_size=500)))
    for suffix in (".bin", ".idx"):
        shutil.copy(other.folder / f"train-00002{suffix}", corpus)
    with pytest.raises(ValueError, match=r"train-00002\.bin (has \d+ bytes|does not match)"):
        TokenStream(corpus, Split.train, verify=Verify.full)


def test_a_corpus_of_another_tokenizer_is_refused(corpus: Path) -> None:
    fingerprint = read_manifest(corpus).tokenizer.fingerprint
    for known in (None, fingerprint):
        TokenStream(corpus, Split.train, verify=Verify.fast, tokenizer_fingerprint=known)
    with pytest.raises(ValueError, match=r"made with the tokenizer .*, the model belongs to 0000"):
        TokenStream(corpus, Split.train, verify=Verify.fast, tokenizer_fingerprint="0" * 64)


def test_an_index_that_is_damaged_is_found_without_hashes(corpus: Path) -> None:
    flip_bit(corpus / "train-00000.idx", 0)
    stream = TokenStream(corpus, Split.train, verify=Verify.fast)
    with pytest.raises(OSError, match=r"train-00000\.idx is not a Megatron index"):
        stream.read(0, 10)


def test_a_folder_without_a_finished_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no finished corpus .*run prepare"):
        TokenStream(tmp_path, Split.train, verify=Verify.full)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="has version 99, this program reads 2"):
        read_manifest(tmp_path)
