"""What a mixture holds out is its sources' own, whatever else is mixed, where and when."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.blend import SourceConfig
from data.config import FilesData, MixtureData, Verify
from data.held_out import open_held_out
from data.manifest import read_manifest, write_manifest
from data.prepare import Prepared, make_ready, prepare
from data.samples import IGNORED, open_samples
from data.shards import Shard
from data.tokenizer import TokenizerConfig
from data.unigram import load_counts
from tests.data.conftest import ConfigMaker


@pytest.fixture(scope="module")
def other(
    prepared: Prepared, make_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory
) -> FilesData:
    """A second source, of the first one's tokenizer: another split of the same text."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))
    config = make_config(folder, tokenizer=tokenizer, validation_fraction=0.5)
    prepare(config)
    return config


def mix(*folders: Path | str, weights: tuple[float, ...] = (3, 1)) -> MixtureData:
    sources = [
        SourceConfig(name=name, folder=str(source), weight=weight)
        for name, source, weight in zip("ab", folders, weights, strict=False)
    ]
    return MixtureData(sources=sources, seq_len=32, verify=Verify.full)


def list_files(*folders: Path | str) -> dict[Path, int]:
    """Every file below the folders and when it was written."""
    paths = [path for folder in folders for path in Path(folder).rglob("*")]
    return {path: path.stat().st_mtime_ns for path in paths}


def test_a_mixtures_held_out_text_is_its_sources_in_a_row(
    prepared: Prepared, other: FilesData
) -> None:
    held_out = open_held_out(mix(prepared.folder, other.folder))
    folders = (prepared.folder, Path(other.folder))
    records = [read_manifest(folder).validation for folder in folders]
    stored = [
        np.fromfile(folder / shard.bin.name, np.uint16)
        for folder, record in zip(folders, records, strict=True)
        for shard in record.shards
    ]
    tokens = np.concatenate(stored)
    samples = held_out.samples
    assert samples.num_samples == (len(tokens) - 1) // 32
    for number in range(samples.num_samples):
        assert (samples[number].tokens == tokens[number * 32 : number * 32 + 32]).all()
    bos = prepared.manifest.tokenizer.bos_id
    starts = np.flatnonzero(tokens[: samples.num_samples * 32] == bos)
    lengths = [length for k in range(samples.num_samples) for length in samples[k].document_lengths]
    every_32 = np.arange(0, samples.num_samples * 32, 32)
    borders = np.union1d(starts, every_32)
    assert lengths == np.diff([*borders, samples.num_samples * 32]).tolist()
    assert held_out.text_bytes == sum(record.text_bytes for record in records)
    documents = sum(record.documents for record in records)
    assert held_out.predicted == len(tokens) - documents
    unmasked = replace(mix(prepared.folder, other.folder), mask_documents=False)
    assert open_held_out(unmasked).predicted == len(tokens)


def test_prompts_of_any_source_are_not_judged(prepared: Prepared, tmp_path: Path) -> None:
    rows = [{"question": f"what is {n} ", "answer": f"it is {n * n} or so"} for n in range(40)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = FilesData(
        folder=str(tmp_path / "questions"),
        paths=[str(tmp_path / "qa.jsonl")],
        template="{answer}",
        prompt_template="{question}",
        validation_fraction=0.5,
        tokenizer=TokenizerConfig(path=str(prepared.folder / "tokenizer.model")),
        processes=1,
    )
    prepare(questions)
    samples = open_held_out(mix(prepared.folder, questions.folder)).samples
    expected: list[int] = []  # each token as a target
    for folder in (prepared.folder, Path(questions.folder)):
        for record in read_manifest(folder).validation.shards:
            shard = Shard(folder / record.name)
            borders = pairwise(shard.all_starts().tolist())
            for (start, stop), prompt in zip(borders, shard.prompt_lengths().tolist(), strict=True):
                hidden = max(prompt, 1)
                expected += [IGNORED] * hidden + shard.tokens[start + hidden : stop].tolist()
    found = [target for k in range(samples.num_samples) for target in samples[k].targets.tolist()]
    assert found == expected[1 : len(found) + 1]
    assert len(expected) - len(found) <= 32
    assert found.count(IGNORED) > prepared.manifest.validation.documents + 40  # prompts are long


def test_frequencies_of_training_tokens_are_weighted_as_the_mixture_is(
    prepared: Prepared, other: FilesData
) -> None:
    counts = open_held_out(mix(prepared.folder, other.folder, weights=(0.9, 0.1))).train_counts
    folders = [Path(folder) for folder in (prepared.folder, other.folder)]
    parts = [load_counts(folder / read_manifest(folder).train.unigram.name) for folder in folders]
    wanted = 0.9 * parts[0] / parts[0].sum() + 0.1 * parts[1] / parts[1].sum()
    assert np.abs(counts / counts.sum() - wanted).max() < 1e-3
    (alone,) = (open_held_out(mix(folder)) for folder in [other.folder])
    assert (alone.train_counts == parts[1]).all()


def test_mixtures_of_other_sources_or_another_order_leave_each_others_held_out_text_alone(
    prepared: Prepared, other: FilesData, tmp_path: Path
) -> None:
    """Even if both name one folder, in which earlier versions kept what they held out."""
    shared = tmp_path / "mixture"
    both = replace(mix(prepared.folder, other.folder), folder=str(shared))
    make_ready(both)
    before = open_held_out(both)
    first = before.samples[0].tokens.tolist()
    for config in (mix(prepared.folder), mix(other.folder, prepared.folder)):
        make_ready(replace(config, folder=str(shared)))
        assert open_held_out(config).fingerprint != before.fingerprint
    after = open_held_out(both)
    assert after.fingerprint == before.fingerprint
    assert after.samples.num_samples == before.samples.num_samples
    assert after.samples[0].tokens.tolist() == first
    assert not shared.exists()


def test_making_a_mixture_ready_writes_nothing(prepared: Prepared, other: FilesData) -> None:
    before = list_files(prepared.folder, other.folder)
    make_ready(mix(prepared.folder, other.folder))
    open_held_out(mix(prepared.folder, other.folder))
    assert list_files(prepared.folder, other.folder) == before


def test_other_weights_and_names_hold_out_the_same_text(
    prepared: Prepared, other: FilesData
) -> None:
    config = mix(prepared.folder, other.folder)
    wanted = open_held_out(config).fingerprint
    renamed = [replace(source, name=f"new {source.name}") for source in config.sources]
    assert open_held_out(replace(config, sources=renamed)).fingerprint == wanted
    weighted = mix(prepared.folder, other.folder, weights=(1, 9))
    assert open_held_out(weighted).fingerprint == wanted


def test_what_cannot_be_mixed_is_refused_with_the_source_and_a_way_out(
    prepared: Prepared, make_config: ConfigMaker, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"the source b: .* holds no finished corpus"):
        make_ready(mix(prepared.folder, tmp_path / "nowhere"))
    foreign = make_config(tmp_path / "foreign", tokenizer=TokenizerConfig(vocab_size=380))
    prepare(foreign)
    with pytest.raises(ValueError, match=r"a and b were made with different .* prepare b again"):
        make_ready(mix(prepared.folder, foreign.folder))
    with pytest.raises(ValueError, match=r"a and b were made with different .* prepare b again"):
        open_samples(mix(prepared.folder, foreign.folder))


def test_a_mixtures_folder_of_an_earlier_version_is_named_for_what_it_is(
    prepared: Prepared, tmp_path: Path
) -> None:
    train = replace(prepared.manifest.train, index=None)  # type: ignore[arg-type]
    write_manifest(tmp_path, replace(prepared.manifest, train=train))
    with pytest.raises(ValueError, match=r"describes a mixture, .* name its sources instead"):
        make_ready(mix(tmp_path))
