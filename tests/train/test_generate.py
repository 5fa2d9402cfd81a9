"""Text from a run, and its evaluation, without DeepSpeed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data.batches import validation_batches
from data.samples import IGNORED, open_samples
from model.config import MTPConfig
from tests.data.web_server import serve
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from train.checkpoint.restore import restore
from train.config import CONFIG_FILE, RunConfig, write_config
from train.engine.engine import join
from train.evaluate_run import EvaluateConfig, evaluate_run
from train.generate import GenerateConfig, Writer, read_prompts
from train.hub.gate import real_tokens
from train.journal import read_records
from train.layout.parallel import ParallelConfig
from train.loop import train as train_run
from train.ranks import alone

NUM_EVALUATED = 150  # the last batch of a rank is not full


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that two ranks have trained with EP 2."""
    parallel = ParallelConfig(expert=2, micro_batch_size=4)
    config = tiny_run(tmp_path_factory.mktemp("generate"), parallel=parallel)
    config.data.folder = str(corpus)
    config.evaluation.max_sequences = NUM_EVALUATED
    run_dir = Path(config.run_dir)
    run_dir.mkdir()
    write_config(config, run_dir / CONFIG_FILE)
    run_ranks(2, lambda: train_run(config, join(config.parallel, timeout_minutes=5)).step)
    return config


PROMPTS = ["def train", "", "import torch\n\n\nclass Tiny", "x"]


def ask(config: RunConfig, **changes: Any) -> GenerateConfig:
    values = {"run_dir": config.run_dir, "max_new_tokens": 16, "seed": 3, **changes}
    return GenerateConfig(**values)


def test_pieces_join_to_the_decoded_text_and_a_seed_repeats_it(config: RunConfig) -> None:
    writer = Writer(ask(config))
    text = "".join(writer.stream("def "))
    assert text
    assert "".join(writer.stream("def ")) == text
    assert list(Writer(ask(config, prompts=["def "])).write()) == [text]
    assert writer.effort.tokens <= 32
    assert writer.effort.tokens_per_pass == 1


def test_a_run_whose_corpus_lies_behind_a_url_writes_with_its_tokenizer_alone(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "checkpoints").symlink_to(Path(config.run_dir) / "checkpoints")
    text = list(Writer(ask(config, prompts=["def "])).write())
    with serve(Path(config.data.folder)) as web:
        data = replace(config.data, folder=web.url)
        write_config(replace(config, run_dir=str(tmp_path), data=data), tmp_path / CONFIG_FILE)
        assert list(Writer(ask(config, run_dir=str(tmp_path), prompts=["def "])).write()) == text
        assert len(web.asked) == 2, "its manifest and its tokenizer"
        assert real_tokens(data).equal(real_tokens(config.data))  # what `export` looks at besides
        assert not any("train" in name or "documents" in name for name in web.asked)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_batches_and_drafts_change_no_text(config: RunConfig, temperature: float) -> None:
    common = {"prompts": PROMPTS, "temperature": temperature}
    alone_texts = list(Writer(ask(config, **common, batch_size=1)).write())
    assert len(alone_texts) == len(PROMPTS)
    assert list(Writer(ask(config, **common, batch_size=3)).write()) == alone_texts
    drafted = Writer(ask(config, **common, batch_size=3, draft=True))
    assert list(drafted.write()) == alone_texts
    effort = drafted.effort
    assert effort.drafts == effort.passes - len(PROMPTS)
    assert effort.acceptance_rate == effort.accepted / effort.drafts
    assert effort.tokens_per_pass == effort.tokens / effort.passes


def test_drafts_of_a_model_without_mtp_are_refused(config: RunConfig, tmp_path: Path) -> None:
    model = replace(config.model, mtp=MTPConfig(depth=0))
    without = replace(config, model=model, run_dir=str(tmp_path))
    write_config(without, tmp_path / CONFIG_FILE)
    # What the run left, without the tensors of MTP that its config does not know.
    (tmp_path / "checkpoints").symlink_to(Path(config.run_dir) / "checkpoints")
    assert list(Writer(ask(without, max_new_tokens=1)).write())
    with pytest.raises(ValueError, match=r"draft=true, but .* no MTP .* set draft=false"):
        Writer(ask(without, draft=True))


def test_prompts_come_from_lines_or_objects(tmp_path: Path) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("def a\n\n  b \n")
    objects.write_text('{"prompt": "two\\nlines"}\n{"prompt": "", "id": 3}\n')
    assert read_prompts(GenerateConfig(run_dir="", prompts_file=str(lines))) == ["def a", "  b "]
    assert read_prompts(GenerateConfig(run_dir="", prompts_file=str(objects))) == ["two\nlines", ""]
    assert read_prompts(GenerateConfig(run_dir="", prompts=["a", "b"])) == ["a", "b"]
    assert read_prompts(GenerateConfig(run_dir="")) == [""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "prompts.jsonl holds no prompt"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "prompts.jsonl:2 is no prompt"),
        ("[1]\n", "prompts.jsonl:1 is no prompt"),
        ("def\n", "prompts.jsonl:1 is no prompt"),
        ('{"prompt": 3}\n', "prompts.jsonl:1 is no prompt"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(GenerateConfig(run_dir="", prompts_file=str(path)))


def test_the_evaluation_equals_full_logits_and_the_run_s_own(config: RunConfig) -> None:
    got = evaluate_run(EvaluateConfig(run_dir=config.run_dir, max_sequences=NUM_EVALUATED))
    model, _, _, step = restore(Path(config.run_dir), ranks=alone())
    samples = open_samples(config.data)
    nats, targets = 0.0, 0
    with torch.no_grad():
        for batch in validation_batches(
            samples, rank=0, world=1, micro_batch_size=1, limit=NUM_EVALUATED
        ):
            kept = batch.targets != IGNORED
            for length, tokens, wanted in zip(
                batch.document_lengths,
                batch.tokens[0].split(batch.document_lengths),
                batch.targets[0].split(batch.document_lengths),
                strict=True,
            ):
                assert length == len(tokens)
                logits = model.logits(tokens[None])[0]
                nats += F.cross_entropy(logits, wanted, reduction="sum").item()
            targets += int(kept.sum())
    assert got.targets == targets
    assert got.loss == pytest.approx(nats / targets, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(got.loss))
    own = read_records(Path(config.run_dir), event="evaluation")[-1]
    assert own["step"] == step
    assert own["loss"] == pytest.approx(got.loss, rel=1e-6)
    assert own["unigram_entropy"] == got.unigram_entropy


def test_a_step_without_checkpoint_is_refused_with_those_there_are(config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"step=5 has no checkpoint .* choose one of \[2, 4, 6\]"):
        restore(Path(config.run_dir), ranks=alone(), step=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"prompts": ["a"], "prompts_file": "b.txt"}, "exclude each other"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"run_dir": "/nowhere"}, "no config of a run"),
    ],
)
def test_impossible_requests_are_refused(
    config: RunConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Writer(ask(config, **changes))
