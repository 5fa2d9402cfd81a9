"""What is shown of a step is what the step read, wherever in the run's history it lies."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import train.loop
from data.blend import SourceConfig
from data.config import MixtureData
from data.packing import Packing
from data.prepare import prepare
from data.tokenizer import TokenizerConfig
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from train.config import RunConfig, write_config
from train.engine.engine import join
from train.layout.parallel import ParallelConfig
from train.loop import train as train_run
from train.step_samples import read_step


def train_on(config: RunConfig, num_ranks: int) -> dict[int, list[list[int]]]:
    """Tokens of every sample that each step got, in the order of the global batch."""
    read, seen = train.loop.read, []

    def noted(*args: Any) -> Any:
        result = read(*args)
        seen.append((args[1].samples, [batch.tokens for batch in result.batches]))
        return result

    def be_rank() -> Any:
        with mock.patch.object(train.loop, "read", noted):
            train_run(config, join(config.parallel, timeout_minutes=0.5))
        return seen

    write_config(config, Path(config.run_dir) / "config.yaml")
    by_rank = run_ranks(num_ranks, be_rank)
    steps = {}
    for steps_of_ranks in zip(*by_rank, strict=True):
        first = steps_of_ranks[0][0]
        batches = zip(*(batches for _, batches in steps_of_ranks), strict=True)
        in_order = [batch for micro_batches in batches for batch in micro_batches]
        steps[first] = torch.cat(in_order).tolist()
    return steps


@pytest.fixture
def config(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run over two sources, one of them behind a URL, of which it knows by its own mixture."""
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    config = tiny_run(tmp_path)
    other = replace(
        config.data,
        folder=str(tmp_path / "other"),
        # So many files of the standard library that neither split can be empty.
        paths=[str(Path(package.__file__).parent / "*.py") for package in (json, importlib)],
        validation_fraction=0.3,
        tokenizer=TokenizerConfig(path=str(corpus / "tokenizer.model")),
    )
    prepare(other)
    config.data = MixtureData(
        sources=[
            SourceConfig(name="a", folder=f"file://{corpus}", weight=0.6),
            SourceConfig(name="b", folder=other.folder, weight=0.4),
        ],
        seq_len=16,
        cache_bytes=0,
    )
    Path(config.run_dir).mkdir()
    return config


@pytest.mark.slow
def test_a_steps_samples_are_found_again_through_changes_of_ranks_batch_and_blend(
    config: RunConfig,
) -> None:
    assert isinstance(config.data, MixtureData)
    config.schedule.steps = config.checkpoint.every = 3
    steps = train_on(config, 1)
    config.parallel = ParallelConfig(micro_batch_size=2)
    config.data = replace(config.data, packing=Packing.best_fit)
    config.data.sources = [
        SourceConfig(name=source.name, folder=source.folder, weight=1.0)
        for source in config.data.sources
    ]
    config.schedule.steps, config.schedule.batch_size = 5, 12
    steps |= train_on(config, 2)
    assert sorted(steps) == [0, 8, 16, 24, 36]
    run_dir = Path(config.run_dir)
    for step, first in enumerate(sorted(steps), start=1):
        found = read_step(run_dir, step)
        assert found.stretch == (first, len(steps[first]))
        assert [content.tokens[0].tolist() for content in found.contents] == steps[first]
    assert {row.source for row in found.rows} == {"a", "b"}
    for step in (0, 6):
        with pytest.raises(ValueError, match=rf"step={step}: .* has done the steps 1 to 5"):
            read_step(run_dir, step)
