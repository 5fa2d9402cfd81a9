"""Corpora that other tools have tokenized are read where they lie, document by document."""

import os
import re
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from datatrove.pipeline.tokens.tokenizer import TokenizedFile
from hypothesis import given, settings
from hypothesis import strategies as st

import data.datatrove_index
from data.config import TokenizedData, check_data
from data.corpus import find_token_files
from data.datatrove_index import DatatroveIndex
from data.documents import MappedIndex
from data.fim import FimConfig
from data.manifest import Split
from data.packing import Packing
from data.position import Position
from data.prepare import Prepared, prepare
from data.retry import RetryConfig
from data.samples import open_samples
from data.shards import Shard
from data.token_stream import TokenStream
from data.tokenizer import TokenizerConfig, load_tokenizer
from data.training_data import TrainingData


def write_megatron(folder: Path, name: str, documents: list[list[int]], size: int = 2) -> None:
    """By datatrove's writer of Megatron's format."""
    file = MegatronTokenizedFile(str(folder), name, token_size=size)
    for ids in documents:
        file.write(ids)
    file.close()


def write_datatrove(
    folder: Path,
    name: str,
    documents: list[list[int]],
    size: int = 2,
    masks: list[str] | None = None,
) -> None:
    """By datatrove's writer of its own format; with a mask for each document, 0 for no loss."""
    file = TokenizedFile(
        str(folder),
        f"{name}.ds",
        token_size=size,
        save_final_metadata=True,
        save_loss_metadata=masks is not None,
    )
    for ids, mask in zip(documents, masks or [None] * len(documents), strict=True):
        file.write(ids, None if mask is None else np.array(list(map(int, mask))))
    file.close()


WRITERS: dict[str, Callable[..., None]] = {"bin": write_megatron, "ds": write_datatrove}


@pytest.fixture
def config(prepared: Prepared, tmp_path: Path) -> TokenizedData:
    return TokenizedData(
        folder=str(tmp_path / "corpus"),
        paths=[f"{tmp_path}/train*.[bd]*"],
        validation_paths=[f"{tmp_path}/held_out*.[bd]*"],
        tokenizer=TokenizerConfig(path=str(prepared.folder / "tokenizer.model")),
        seq_len=32,
    )


def tokenize(prepared: Prepared, texts: list[str]) -> list[list[int]]:
    """As other tools do: no bos."""
    tokenizer = load_tokenizer(prepared.folder / "tokenizer.model")
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


@pytest.mark.parametrize(("kind", "size"), [("bin", 2), ("ds", 2), ("bin", 4), ("ds", 4)])
def test_every_document_is_trained_on_as_it_was_written(
    kind: str, size: int, prepared: Prepared, config: TokenizedData, tmp_path: Path
) -> None:
    texts = [f"document {number} of {number * 7 % 40} words " * 3 for number in range(40)]
    ids = tokenize(prepared, texts)
    write = WRITERS[kind]
    write(tmp_path, "train_a", [*ids[:10], [], *ids[10:15], []], size)  # two of them empty
    write(tmp_path, "train_b", ids[15:30], size)
    write(tmp_path, "held_out", ids[30:], size)
    manifest = prepare(config).manifest
    assert manifest.train.documents == 30
    assert manifest.train.tokens == sum(map(len, ids[:30]))
    assert manifest.validation.text_bytes == sum(len(text.encode()) for text in texts[30:])
    copied = {path.suffix for path in Path(config.folder).iterdir()}
    assert copied == {".model", ".json", ".npy", ".i64", ".lock"}  # no tokens
    index = MappedIndex(Path(config.folder) / "documents-train.i64", None)
    spans = index.find(np.arange(30))
    stream = TokenStream(Path(config.folder), Split.train, verify=config.verify)
    found = [
        stream.read(start, start + length).tolist()
        for start, length in zip(spans.starts.tolist(), spans.lengths.tolist(), strict=True)
    ]
    assert found == ids[:30]
    data = TrainingData(config, seed=0)
    (rows,) = data.read(data.draw(Position(), 8).rows, batch_size=8)
    eos = manifest.tokenizer.eos_id
    assert (rows.targets == eos).sum() >= 3
    assert (rows.targets[rows.tokens == eos] < 0).all()  # nothing is learnt across documents
    assert prepare(config).was_ready


def test_documents_of_several_sentences_are_whole(
    prepared: Prepared, config: TokenizedData, tmp_path: Path
) -> None:
    """Megatron's tools may split a document into sentences: one sequence each."""
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, 4, 3)
    lengths, offsets = struct.pack("<4i", 2, 3, 1, 2), struct.pack("<4q", 0, 8, 20, 24)
    borders = struct.pack("<3q", 0, 3, 4)
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.idx").write_bytes(header + lengths + offsets + borders)
        np.arange(8, dtype="<i4").tofile(tmp_path / f"{name}.bin")
    manifest = prepare(config).manifest
    assert manifest.train.documents == 2
    assert manifest.train.prompt_tokens == 0  # the first sentence is no prompt
    spans = MappedIndex(Path(config.folder) / "documents-train.i64", None).find(np.arange(2))
    assert (spans.starts.tolist(), spans.lengths.tolist()) == ([0, 6], [6, 2])


def test_no_loss_is_taken_where_datatroves_mask_says_so(
    prepared: Prepared, config: TokenizedData, tmp_path: Path
) -> None:
    documents = [list(range(10 * n + 10, 10 * n + 20)) for n in range(6)]
    masks = ["0001111111", "1111111111", "1000111111", "0000000000", "0111111111", "1111111111"]
    write_datatrove(tmp_path, "train", documents, masks=masks)
    write_datatrove(tmp_path, "held_out", documents, masks=masks)
    manifest = prepare(config).manifest
    is_learnt = {
        token: int(flag) and token != ids[0]  # with a mask, no first token is
        for ids, mask in zip(documents, masks, strict=True)
        for token, flag in zip(ids, mask, strict=True)
    }
    learnt = {token for token, flag in is_learnt.items() if flag}
    data = TrainingData(config, seed=0)
    drawn = data.draw(Position(), 2)
    assert drawn.position.sources["corpus"].document == 6  # an epoch
    (rows,) = data.read(drawn.rows, batch_size=2)
    assert sorted(rows.targets[rows.targets >= 0].tolist()) == sorted(learnt)
    targets = open_samples(config)[0].targets
    assert set(targets[targets >= 0].tolist()) == learnt & set(range(10, 10 + 33))
    split = manifest.validation
    assert split.count_predicted(are_documents_masked=True) == len(learnt)
    assert split.count_predicted(are_documents_masked=False) == len(learnt) + len(documents)
    tokenizer = load_tokenizer(prepared.folder / "tokenizer.model")
    told = [ids[max(mask.rfind("0") + 1, 1) :] for ids, mask in zip(documents, masks, strict=True)]
    assert split.text_bytes == sum(len(tokenizer.decode(ids).encode()) for ids in told)
    (tmp_path / "train.ds.loss").write_bytes(b"\1" * 60)
    with pytest.raises(ValueError, match=r"train\.ds\.loss has changed"):
        prepare(config)


GAPS = ["0110010111", "1111111111", "1101011110", "0000000000", "0101010101", "1011111111"]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("seq_len", "packing"), [(32, "concatenate"), (7, "best_fit"), (7, "concatenate")]
)
def test_no_loss_is_taken_in_the_midst_of_documents_where_datatroves_mask_says_so(
    masked: bool,
    seq_len: int,
    packing: str,
    prepared: Prepared,
    config: TokenizedData,
    tmp_path: Path,
) -> None:
    documents = [list(range(10 * n + 10, 10 * n + 20)) for n in range(6)]
    plain = [list(range(10 * n + 100, 10 * n + 110)) for n in range(3)]  # a shard without a mask
    for name in ("train", "held_out"):
        write_datatrove(tmp_path, f"{name}_a", documents, masks=GAPS)
        write_datatrove(tmp_path, f"{name}_b", plain)
    config.seq_len, config.packing, config.mask_documents = seq_len, Packing(packing), masked
    with mock.patch.object(data.datatrove_index, "SCANNED_AT_ONCE", 7):
        manifest = prepare(config).manifest
    learnt = {
        token
        for ids, mask in zip(documents, GAPS, strict=True)
        for token, flag in zip(ids[1:], mask[1:], strict=True)
        if flag == "1"
    } | {token for ids in plain for token in ids[1:]}
    firsts = {ids[0] for ids in documents + plain}
    training = TrainingData(config, seed=0)
    drawn = training.draw(Position(), 1)
    while drawn.position.sources["corpus"].document < 9:  # an epoch
        drawn = training.draw(Position(), len(drawn.rows) + 1)
    found = [
        target
        for rows in training.read(drawn.rows, batch_size=2 - len(drawn.rows) % 2)
        for target in rows.targets[rows.targets >= 0].tolist()
    ]
    found = [token for token in found if token not in firsts or masked]
    if not masked and packing == "best_fit":  # there a piece's first token follows another document
        found = list(set(found))
    assert sorted(found) == sorted(learnt)
    held_out = open_samples(config)
    targets = {t for k in range(held_out.num_samples) for t in held_out[k].targets.tolist()} - {
        -100
    }
    last = held_out.num_samples * seq_len
    whole = [token for ids in documents + plain for token in ids]
    assert targets - firsts == learnt & set(whole[: last + 1])
    split = manifest.validation
    assert split.count_predicted(are_documents_masked=True) == len(learnt)
    tokenizer = load_tokenizer(prepared.folder / "tokenizer.model")
    runs = [
        ids[run.start() : run.end()]
        for ids, mask in zip(documents, GAPS, strict=True)
        for run in re.finditer("1+", f"0{mask[1:]}")
    ] + plain
    assert split.text_bytes == sum(len(tokenizer.decode(ids).encode()) for ids in runs)


@settings(max_examples=60, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), max_size=8), min_size=1, max_size=8).filter(any),
    piece=st.integers(1, 12),
)
def test_a_mask_that_is_read_in_pieces_equals_a_loop(
    masks: list[list[bool]], piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever its pieces and documents, empty ones too."""
    folder = tmp_path_factory.mktemp("mask")
    write_datatrove(folder, "one", [[7] * len(mask) for mask in masks])
    (folder / "one.ds.loss").write_bytes(bytes(flag for mask in masks for flag in mask))
    with mock.patch.object(data.datatrove_index, "SCANNED_AT_ONCE", piece):
        index = DatatroveIndex(folder / "one.ds", folder / "one.ds.index")
        prompts, hidden = index.prompt_lengths().tolist(), index.count_hidden()
    learnt = [[k for k, flag in enumerate(mask) if flag and k] for mask in masks]
    assert prompts == [next(iter(k), len(mask)) for k, mask in zip(learnt, masks, strict=True)]
    assert hidden == sum(map(len, masks)) - sum(map(len, learnt))


def test_documents_with_a_mask_are_left_as_they_are_by_fim(
    prepared: Prepared, config: TokenizedData, tmp_path: Path
) -> None:
    for name in ("train", "held_out"):
        write_datatrove(tmp_path, name, [list(range(10, 40))] * 3, masks=["01" * 15] * 3)
        write_datatrove(tmp_path, f"{name}_plain", [list(range(50, 80))] * 3)
    config.fim, config.seq_len = FimConfig(rate=1.0), 200  # an epoch is a row
    prepare(config)
    training = TrainingData(config, seed=0)
    (rows,) = training.read(training.draw(Position(), 1).rows, batch_size=1)
    stored = rows.tokens[rows.is_real].tolist()
    at = [place for place, token in enumerate(stored) if token == 10]
    assert len(at) == 3
    assert all(stored[place : place + 30] == list(range(10, 40)) for place in at)
    assert prepared.manifest.tokenizer.fim is not None
    assert set(prepared.manifest.tokenizer.fim) <= set(stored)


def test_a_mask_that_is_cut_short_while_a_run_reads_is_an_error_that_names_it(
    prepared: Prepared, config: TokenizedData, tmp_path: Path
) -> None:
    documents = [list(range(10 * n + 10, 10 * n + 20)) for n in range(6)]
    for name in ("train", "held_out"):
        write_datatrove(tmp_path, name, documents, masks=GAPS)
    config.retry = RetryConfig(attempts=2, wait_seconds=0)  # the second opens it once more
    prepare(config)
    training = TrainingData(config, seed=0)
    rows = training.draw(Position(), 2).rows
    training.read(rows, batch_size=2)
    os.truncate(tmp_path / "train.ds.loss", 0)
    with pytest.raises(OSError, match=r"train\.ds\.loss has 0 bytes, was prepared with 60"):
        training.read(rows, batch_size=2)


def test_a_changed_file_is_refused(
    prepared: Prepared, config: TokenizedData, tmp_path: Path
) -> None:
    ids = tokenize(prepared, ["one", "two"])
    for name in ("train", "held_out"):
        write_datatrove(tmp_path, name, ids)
    prepare(config)
    write_datatrove(tmp_path, "train", ids * 2)
    with pytest.raises(ValueError, match=r"train\.ds has changed.*Choose another data\.folder"):
        prepare(config)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: (folder / "train.bin").unlink(), r"data\.paths: .* matches no file"),
        (lambda folder: (folder / "train.idx").unlink(), r"train\.bin has no train\.idx beside"),
        (lambda folder: (folder / "held_out.ds.index").unlink(), r"no held_out\.ds\.index beside"),
        (
            lambda folder: (folder / "held_out.ds").write_bytes(b"\1\0\1"),
            r"held_out\.ds holds 3 bytes, which are not the \d+ tokens .* cut short",
        ),
        (
            lambda folder: (folder / "held_out.ds.loss").write_bytes(b"\1"),
            r"held_out\.ds\.loss holds 1 bytes, \d+ tokens are listed: it is cut short",
        ),
        (
            lambda folder: write_megatron(folder, "train", [[1, 60_000]]),
            r"train\.bin holds the token 60000, the tokenizer has only 400; give the tokenizer",
        ),
        (
            lambda folder: write_megatron(folder, "train", [[1, 2]], 4),
            r"held_out\.ds holds tokens as uint16|holds tokens as int32, .* as uint16",
        ),
        (
            lambda folder: write_megatron(folder, "held_out", [[1, 2]], 2),
            None,
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    spoil: Callable[[Path], object],
    complaint: str | None,
    prepared: Prepared,
    config: TokenizedData,
    tmp_path: Path,
) -> None:
    ids = tokenize(prepared, ["one two", "three"])
    write_megatron(tmp_path, "train", ids)
    write_datatrove(tmp_path, "held_out", ids)
    spoil(tmp_path)
    if complaint is None:  # both kinds in one corpus
        assert prepare(config).manifest.validation.documents == 3
        return
    with pytest.raises(ValueError, match=complaint):
        prepare(config)


def test_files_that_are_trained_on_and_held_out_are_refused(
    prepared: Prepared, config: TokenizedData, tmp_path: Path
) -> None:
    write_megatron(tmp_path, "train", tokenize(prepared, ["one"]))
    config.validation_paths = config.paths
    with pytest.raises(ValueError, match=r"train belongs to data\.paths and data\.validation_pa"):
        prepare(config)


def test_the_tokenizer_must_be_given(config: TokenizedData) -> None:
    config.tokenizer.path = None
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path=null, but data=tokenized needs"):
        check_data(config)


def test_documents_can_be_selected_only_where_they_are_text(config: TokenizedData) -> None:
    config.select.exact_duplicates = True
    with pytest.raises(ValueError, match=r"data\.select has no meaning for data=tokenized"):
        check_data(config)


def test_our_shards_are_read_as_megatrons(prepared: Prepared, tmp_path: Path) -> None:
    """Written here, read by the other tool's reader; and as a corpus of tokens again."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    record = prepared.manifest.train.shards[0]
    prefix = prepared.folder / record.name
    theirs, ours = indexed.IndexedDataset(str(prefix)), Shard(prefix)
    borders = ours.all_starts().tolist()
    assert len(theirs) == ours.num_documents == record.documents
    for number, (start, stop) in enumerate(pairwise(borders)):
        assert theirs[number].tolist() == ours.tokens[start:stop].tolist()


def test_prepared_shards_are_found_as_tokenized_files(prepared: Prepared) -> None:
    found = find_token_files([f"{prepared.folder}/train-*.bin"], key="data.paths")
    assert [path.name for path in found] == [s.name for s in prepared.manifest.train.shards]
