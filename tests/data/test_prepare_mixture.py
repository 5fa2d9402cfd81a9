"""A mixture is a corpus of its own that points to its sources, and refuses what can't be mixed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.blend import SourceConfig
from data.config import FilesData, MixtureData, Verify
from data.manifest import Split, read_manifest
from data.prepare import Prepared, prepare
from data.samples import open_samples
from data.tokenizer import TokenizerConfig
from data.unigram import read_unigram
from tests.data.conftest import ConfigMaker
from tests.ranks import run_ranks


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


def mix(folder: Path, *folders: Path | str, weights: tuple[float, ...] = (3, 1)) -> MixtureData:
    sources = [
        SourceConfig(name=name, folder=str(source), weight=weight)
        for name, source, weight in zip("ab", folders, weights, strict=True)
    ]
    return MixtureData(folder=str(folder), sources=sources, seq_len=32, verify=Verify.full)


def test_a_mixtures_manifest_adds_its_sources_up_and_its_held_out_text_is_theirs_in_a_row(
    prepared: Prepared, other: FilesData, tmp_path: Path
) -> None:
    config = mix(tmp_path / "mixture", prepared.folder, other.folder)
    made = prepare(config)
    first, second = prepared.manifest, read_manifest(Path(other.folder))
    for split in Split:
        whole, parts = made.manifest.split(split), [m.split(split) for m in (first, second)]
        assert whole.documents == sum(part.documents for part in parts)
        assert whole.tokens == sum(part.tokens for part in parts)
        assert whole.text_bytes == sum(part.text_bytes for part in parts)
        assert [shard.documents for shard in whole.shards] == [
            shard.documents for part in parts for shard in part.shards
        ]
    assert made.manifest.tokenizer.fingerprint == first.tokenizer.fingerprint
    values = {"paths": ["unused"], "seq_len": 32, "verify": Verify.fast}
    alone = FilesData(folder=str(prepared.folder), **values)  # type: ignore[arg-type]
    held_out, of_first = open_samples(config), open_samples(alone)
    for number in range(of_first.num_samples):
        assert (held_out[number].tokens == of_first[number].tokens).all()
        assert held_out[number].document_lengths == of_first[number].document_lengths
    assert held_out.num_samples > of_first.num_samples
    counts = read_unigram(made.folder, Split.validation)
    folders = (prepared.folder, Path(other.folder))
    parts = [read_unigram(folder, Split.validation) for folder in folders]
    assert (counts == parts[0] + parts[1]).all()


def test_frequencies_of_training_tokens_are_weighted_as_the_mixture_is(
    prepared: Prepared, other: FilesData, tmp_path: Path
) -> None:
    made = prepare(mix(tmp_path / "mixture", prepared.folder, other.folder, weights=(0.9, 0.1)))
    counts = read_unigram(made.folder, Split.train)
    parts = [read_unigram(Path(folder), Split.train) for folder in (prepared.folder, other.folder)]
    wanted = 0.9 * parts[0] / parts[0].sum() + 0.1 * parts[1] / parts[1].sum()
    assert np.abs(counts / counts.sum() - wanted).max() < 1e-3


def test_what_cannot_be_mixed_is_refused_with_the_source_and_a_way_out(
    prepared: Prepared, make_config: ConfigMaker, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"the source b: .* holds no finished corpus"):
        prepare(mix(tmp_path / "mixture", prepared.folder, tmp_path / "nowhere"))
    foreign = make_config(tmp_path / "foreign", tokenizer=TokenizerConfig(vocab_size=380))
    prepare(foreign)
    with pytest.raises(ValueError, match=r"a and b were made with different .* prepare b again"):
        prepare(mix(tmp_path / "mixture", prepared.folder, foreign.folder))
    config = mix(tmp_path / "mixture", prepared.folder, foreign.folder)
    with pytest.raises(ValueError, match=r"is also a source's; the mixture needs a folder of its"):
        prepare(replace(config, folder=str(prepared.folder)))


def test_runs_that_begin_at_once_may_share_a_mixtures_folder(
    prepared: Prepared, other: FilesData, tmp_path: Path
) -> None:
    config = mix(tmp_path / "mixture", prepared.folder, other.folder)

    def prepare_often() -> list[str]:
        return [prepare(config).manifest.origin.sha256 for _ in range(10)]

    assert len({one for made in run_ranks(3, prepare_often) for one in made}) == 1
