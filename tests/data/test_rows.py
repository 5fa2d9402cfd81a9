"""Rows hold the tokens, targets and positions that a loop over whole documents gives."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.config import ALONE, FilesData, Verify
from data.fim import FimConfig, FimMode
from data.packing import Packing
from data.position import Position
from data.prepare import Prepared, prepare
from data.samples import IGNORED, open_samples
from data.shards import Shard
from data.tokenizer import FIM, TokenizerConfig, load_tokenizer
from data.training_data import TrainingData
from tests.data.test_fim import read as read_parts

SEQ_LEN = 50


def read_config(prepared: Prepared, **fields: object) -> FilesData:
    values: dict[str, object] = {"paths": ["unused"], "seq_len": SEQ_LEN, "verify": Verify.fast}
    return FilesData(folder=str(prepared.folder), **(values | fields))  # type: ignore[arg-type]


def list_documents(folder: Path, records: list[str]) -> list[list[int]]:
    documents = []
    for name in records:
        shard = Shard(folder / name)
        starts = shard.all_starts().tolist()
        documents += [shard.tokens[a:b].tolist() for a, b in pairwise(starts)]
    return documents


@pytest.mark.parametrize("fim", [FimConfig(), FimConfig(rate=0.5, mode=FimMode.mix)])
@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("mask_documents", [True, False])
def test_rows_equal_a_loop_over_documents(
    prepared: Prepared, packing: Packing, fim: FimConfig, mask_documents: bool
) -> None:
    config = read_config(prepared, packing=packing, fim=fim, mask_documents=mask_documents)
    data = TrainingData(config, seed=2)
    stored = list_documents(prepared.folder, [s.name for s in prepared.manifest.train.shards])
    source = data.mixture.sources[ALONE]
    drawn = data.draw(Position(), 400)  # several epochs
    (rows,) = data.read(drawn.rows, 400)
    lengths = iter(rows.document_lengths)
    inputs, targets_of = 0, []
    for number, row in enumerate(drawn.rows):
        tokens: list[int] = []
        targets: list[int] = []
        positions: list[int] = []
        for piece in row.pieces:
            block, at = source.find(piece.place, row.fim)
            document = read_parts(source.arrange(piece.place, row.fim), stored[block.documents[at]])
            end = piece.offset + piece.length
            tokens += document[piece.offset : end]
            following = document[piece.offset + 1 : end + 1]
            targets += following + [IGNORED] * (piece.length - len(following))
            targets_of.append(len(following))
            positions += range(piece.length)
            if mask_documents:
                assert next(lengths) == piece.length
        num_real, padding = len(tokens), SEQ_LEN - len(tokens)
        inputs += num_real
        if padding and mask_documents:
            assert next(lengths) == padding
        assert rows.tokens[number].tolist() == tokens + [data.tokenizer.pad_id] * padding
        assert rows.is_real[number].tolist() == [True] * num_real + [False] * padding
        assert rows.positions[number].tolist() == positions + list(range(padding))
        if mask_documents:
            assert rows.targets[number].tolist() == targets + [IGNORED] * padding
        else:  # documents see each other inside a row
            expected = [
                tokens[k + 1] if target == IGNORED and k + 1 < num_real else target
                for k, target in enumerate(targets)
            ]
            assert rows.targets[number].tolist() == expected + [IGNORED] * padding
    assert drawn.position.tokens == inputs
    if mask_documents:
        assert (rows.targets != IGNORED).sum() == sum(targets_of)
    else:
        assert rows.document_lengths == [SEQ_LEN] * 400


def test_an_epoch_has_every_token_once_as_input_and_all_but_the_first_as_target(
    prepared: Prepared,
) -> None:
    stored = list_documents(prepared.folder, [s.name for s in prepared.manifest.train.shards])
    for packing in Packing:
        data = TrainingData(read_config(prepared, packing=packing), seed=0)
        position, inputs, targets = Position(), [], []
        while position.tokens < prepared.manifest.train.tokens:
            drawn = data.draw(position, 1)
            position, (rows,) = drawn.position, data.read(drawn.rows, 1)
            inputs += rows.tokens[rows.is_real].tolist()
            targets += rows.targets[rows.targets != IGNORED].tolist()
        assert sorted(inputs) == sorted(token for document in stored for token in document)
        assert sorted(targets) == sorted(token for document in stored for token in document[1:])


def test_best_fit_cuts_no_document_that_a_row_can_hold(prepared: Prepared) -> None:
    data = TrainingData(read_config(prepared, packing=Packing.best_fit, seq_len=256), seed=0)
    source = data.mixture.sources[ALONE]
    rows = data.draw(Position(), 40).rows
    for row in rows:
        for piece in row.pieces:
            length = source.length(piece.place, row.fim)
            assert piece.length == length if length <= 256 else piece.offset % 256 == 0
    is_real = data.read(rows, len(rows))[0].is_real
    assert is_real.mean() > 0.9


def test_fims_markers_come_from_rearranging_alone_whatever_the_text_holds(
    prepared: Prepared, tmp_path: Path
) -> None:
    """An injection: a third of the documents spell the markers out."""
    texts = [
        f"{number} {''.join(FIM) * (number % 3 == 0)} text {number * 7}" for number in range(300)
    ]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = FilesData(
        folder=str(tmp_path / "corpus"),
        paths=[str(source)],
        tokenizer=TokenizerConfig(path=str(prepared.folder / "tokenizer.model")),
        validation_fraction=0.1,
        seq_len=64,
        processes=1,
        fim=FimConfig(rate=0.5),
    )
    manifest = prepare(config).manifest
    assert manifest.tokenizer.fim is not None
    data = TrainingData(config, seed=0)
    source_ = data.mixture.sources[ALONE]
    drawn, end = data.draw(Position(), 0), manifest.train.documents
    rows = []
    while (at := drawn.position.sources[ALONE]).document < end:
        drawn = data.draw(drawn.position, 1)
        rows += drawn.rows
    (read,) = data.read(rows, len(rows))
    setting = rows[0].fim
    num_rearranged = sum(
        block.is_rearranged[place]
        for block, place in (source_.find(place, setting) for place in range(end))
    )
    assert 0.3 * end < num_rearranged < 0.7 * end
    for marker in manifest.tokenizer.fim:
        assert (read.tokens == marker).sum() == num_rearranged
    # Each document's text comes back whole from what was read of it.
    tokenizer = load_tokenizer(tmp_path / "corpus" / "tokenizer.model")
    found = {tokenizer.decode(read_in_order(source_, place, setting)) for place in range(end)}
    assert len(found) == end
    assert found <= set(texts)
    assert at.document <= end


def read_in_order(source, place, setting) -> list[int]:  # type: ignore[no-untyped-def]
    """A document's tokens in the order of the text, out of its parts."""
    block, at = source.find(place, setting)
    ranges = sorted(part for part in source.arrange(place, setting) if not isinstance(part, int))
    row = np.empty(block.stored[at], np.int64)
    filled = 0
    for start, stop in ranges:
        assert start == filled  # no gap and no overlap
        views = [source.stream.view(block.starts[at] + start, stop - start)]
        row[start:stop] = source.stream.gather(views)
        filled = stop
    return row.tolist()


@pytest.fixture(scope="module")
def answered(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> FilesData:
    """Questions and answers, a few without a question."""
    folder = tmp_path_factory.mktemp("answered")
    rows = [
        {"q": "" if n % 5 == 0 else f"what is {n}?", "a": f"{n} is {n * n % 11}", "n": n}
        for n in range(200)
    ]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FilesData(
        folder=str(folder / "corpus"),
        paths=[str(folder / "qa.jsonl")],
        template="{a} ({n})",
        prompt_template="{q}",
        tokenizer=TokenizerConfig(path=str(prepared.folder / "tokenizer.model")),
        validation_fraction=0.2,
        seq_len=24,
        processes=1,
    )
    prepare(config)
    return config


@pytest.mark.parametrize("packing", list(Packing))
def test_no_loss_is_taken_on_a_prompt(answered: FilesData, packing: Packing) -> None:
    config = replace(answered, packing=packing)
    data = TrainingData(config, seed=0)
    documents = data.mixture.sources[ALONE].num_documents
    position, targets, tokens = Position(), [], []
    while position.sources.get(ALONE) is None or position.sources[ALONE].document < documents:
        drawn = data.draw(position, 1)
        position, (rows,) = drawn.position, data.read(drawn.rows, 1)
        targets += rows.targets[rows.targets != IGNORED].tolist()
        tokens += rows.tokens[rows.is_real].tolist()
    tokenizer = load_tokenizer(Path(config.folder) / "tokenizer.model")
    assert tokens.count(tokenizer.bos_id) == targets.count(tokenizer.eos_id) == documents
    assert "what" in tokenizer.decode(tokens)
    learnt = tokenizer.decode(targets)
    assert "what" not in learnt
    assert "?" not in learnt
    manifest = json.loads((Path(config.folder) / "manifest.json").read_text())["train"]
    predicted = manifest["tokens"] - manifest["prompt_tokens"]
    assert len(targets) == predicted


def test_no_loss_is_taken_on_a_prompt_that_follows_another_document_in_its_row(
    answered: FilesData,
) -> None:
    """Where documents see each other, a piece's first token is the target of the one before it."""
    config = replace(answered, packing=Packing.best_fit, mask_documents=False, seq_len=5)
    data = TrainingData(config, seed=0)
    drawn = data.draw(Position(), 600)
    (rows,) = data.read(drawn.rows, len(drawn.rows))
    tokenizer = load_tokenizer(Path(config.folder) / "tokenizer.model")
    learnt = tokenizer.decode(rows.targets[rows.targets != IGNORED].tolist())
    assert "?" in tokenizer.decode(rows.tokens.flatten().tolist())
    assert "?" not in learnt


def test_held_out_prompts_are_not_judged_either(answered: FilesData) -> None:
    samples = open_samples(answered)
    tokenizer = load_tokenizer(Path(answered.folder) / "tokenizer.model")
    tokens, targets = [], []
    for number in range(samples.num_samples):
        sample = samples[number]
        tokens += sample.tokens.tolist()
        targets += sample.targets[sample.targets != IGNORED].tolist()
    assert "what" in tokenizer.decode(tokens)
    assert "what" not in tokenizer.decode(targets)
    assert " is " in tokenizer.decode(targets)
