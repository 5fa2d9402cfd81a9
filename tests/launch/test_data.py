"""`thrifty data`, as a user calls it: text and pages of what a run reads."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from string import ascii_letters
from unittest import mock

import pytest

from data.batches import Batches
from data.blend import SourceConfig
from data.config import FilesData, MixtureData
from data.position import Position
from data.prepare import prepare
from data.samples import IGNORED
from data.tokenizer import TokenizerConfig, load_tokenizer
from data.training_data import TrainingData
from launch import data as command
from tests.train.tiny import tiny_run
from train.config import RunConfig, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that has done no step, over questions and answers, every fourth one twice."""
    folder = tmp_path_factory.mktemp("run")
    random = Random(0)
    rows = [
        {"q": f"what is {n} & {n}?", "a": f"{n} is {''.join(random.choices(ascii_letters, k=9))}"}
        for n in range(200)
    ]
    rows += rows[::4]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_run(folder)
    config.data = FilesData(
        folder=str(folder / "corpus"),
        paths=[str(folder / "qa.jsonl")],
        template="{a}",
        prompt_template="{q}",
        tokenizer=TokenizerConfig(vocab_size=330),
        validation_fraction=0.2,
        seq_len=64,
        processes=1,
    )
    prepare(config.data)
    write_config(config, _folder(config) / "config.yaml")
    (_folder(config) / "metrics.jsonl").write_text(
        '{"event": "step", "step": 1, "samples": 8}\n{"event": "step", "step": 2, "samples": 16}\n'
    )
    return config


def _folder(config: RunConfig) -> Path:
    Path(config.run_dir).mkdir(exist_ok=True)
    return Path(config.run_dir)


def look(*arguments: str) -> int:
    with mock.patch.object(sys, "argv", ["thrifty data", *arguments]):
        return command.main()


def test_show_prints_a_steps_samples_with_borders_and_what_is_not_learnt(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert look("show", f"run={run.run_dir}", "step=2") == 0
    text = capsys.readouterr().out
    order = TrainingData(run.data, seed=run.seed)
    with Batches(order, rank=0, world=1, micro_batch_size=8) as batches:
        _, position = batches.take(order.enter(Position()), 8)
        (batch,), _ = batches.take(position, 8)
    shown = text.split("== step 2, sample ")[1:]
    assert [int(part.split(" ")[0]) for part in shown] == list(range(8, 16))
    tokenizer = load_tokenizer(Path(run.data.folder) / "tokenizer.model")
    for part, tokens, targets, real in zip(
        shown, batch.tokens, batch.targets, batch.is_real, strict=True
    ):
        content = "".join(line for line in part.splitlines()[1:] if not line.startswith("-- "))
        learnt = re.sub("«.*?»", "", content)
        assert content.replace("«", "").replace("»", "") == tokenizer.decode(tokens[real].tolist())
        wanted = targets[targets != IGNORED].tolist()
        assert f"{len(wanted)} targets" in part
        # The last target may be the first token of another row.
        assert tokenizer.decode(wanted).startswith(learnt) or learnt in tokenizer.decode(wanted)
        assert "what" not in learnt


def test_a_page_needs_nothing_but_itself_and_escapes_the_text(
    run: RunConfig, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert look("show", f"run={run.run_dir}", f"page={page}") == 0
    text = page.read_text()
    assert "&amp;" in text
    assert '<span class="hidden">' in text
    assert not re.search(r"https?://|<script|src=|<link", text)


def test_stats_count_lengths_shares_and_duplicates(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert look("stats", f"run={run.run_dir}") == 0
    text = capsys.readouterr().out
    counts = re.findall(r"^ +[\d,]+-[\d,]+ +(\d+)$", text, re.MULTILINE)
    documents = sum(map(int, counts))
    manifest = json.loads((Path(run.data.folder) / "manifest.json").read_text())["train"]
    assert documents == manifest["documents"]
    (repeated,) = re.findall(r"(\d+) of 2\d\d", text)
    assert 30 <= int(repeated) <= 50, "a document and its copy are held out together"
    page = tmp_path / "page.html"
    assert look("stats", f"run={run.run_dir}", f"page={page}") == 0
    assert page.read_text().count("<svg") == 1  # nothing is read yet: no shares


def test_a_sources_name_is_text_on_the_page(run: RunConfig, tmp_path: Path) -> None:
    sources = [SourceConfig(name="<script>", folder=run.data.folder, weight=1)]
    data = MixtureData(sources=sources, seq_len=64)
    config = replace(run, run_dir=str(tmp_path / "run"), data=data)
    write_config(config, _folder(config) / "config.yaml")
    page = tmp_path / "page.html"
    assert look("stats", f"run={config.run_dir}", f"page={page}") == 0
    assert "<script>" not in page.read_text()
    assert "&lt;script&gt;: documents" in page.read_text()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert look("show", f"run={tmp_path}") == 2
    assert "holds no run (no config.yaml); name a run's folder" in capsys.readouterr().err
