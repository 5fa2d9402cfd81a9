"""Text from a run, and its evaluation, without DeepSpeed."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data.batches import validation_batches
from data.manifest import Split
from data.samples import IGNORED, open_samples
from tests.ranks import run_ranks
from tests.train.tiny import tiny_run
from train.config import CONFIG_FILE, RunConfig, write_config
from train.engine import join
from train.evaluate import EvaluateConfig, evaluate_run
from train.generate import GenerateConfig, draw, generate, sample_tokens
from train.journal import read_records
from train.loop import train as train_run
from train.parallel import ParallelConfig
from train.ranks import alone
from train.restore import restore


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that two ranks have trained with EP 2."""
    parallel = ParallelConfig(expert=2, micro_batch_size=4)
    config = tiny_run(tmp_path_factory.mktemp("generate"), parallel=parallel)
    config.data.folder = str(corpus)
    config.evaluation.max_sequences = None
    run_dir = Path(config.run_dir)
    run_dir.mkdir()
    write_config(config, run_dir / CONFIG_FILE)
    run_ranks(2, lambda: train_run(config, join(config.parallel, timeout_minutes=0.5)).step)
    return config


def test_greedy_tokens_are_the_likeliest_of_full_forward_passes(config: RunConfig) -> None:
    model, tokenizer, *_ = restore(Path(config.run_dir), ranks=alone())
    prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("def train")]])
    got = list(sample_tokens(model, prompt, max_new_tokens=12, temperature=0.0, top_p=1.0, seed=0))
    tokens = prompt
    with torch.no_grad():
        for token in got:
            assert token == model.logits(tokens)[0, -1].argmax()
            tokens = torch.cat((tokens, torch.tensor([[token]])), dim=1)


def test_pieces_join_to_the_decoded_text_and_a_seed_repeats_it(config: RunConfig) -> None:
    ask = GenerateConfig(run_dir=config.run_dir, prompt="def ", max_new_tokens=30, seed=3)
    text = "".join(generate(ask))
    assert text
    assert "".join(generate(ask)) == text


def test_top_p_keeps_the_smallest_set_that_holds_its_share() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(top_p: float) -> set[int]:
        return {draw(logits, temperature=1.0, top_p=top_p, generator=generator) for _ in range(300)}

    assert drawn(0.4) == {0}
    assert drawn(0.7) == {0, 1}
    assert drawn(1.0) == {0, 1, 2, 3}


def test_the_evaluation_equals_full_logits_and_the_run_s_own(config: RunConfig) -> None:
    got = evaluate_run(EvaluateConfig(run_dir=config.run_dir))
    model, _, _, step = restore(Path(config.run_dir), ranks=alone())
    samples = open_samples(config.data, Split.validation, seed=0)
    nats, targets = 0.0, 0
    with torch.no_grad():
        for batch in validation_batches(samples, rank=0, world=1, micro_batch_size=1):
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
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"run_dir": "/nowhere"}, "no config of a run"),
    ],
)
def test_impossible_requests_are_refused(
    config: RunConfig, changes: dict[str, object], message: str
) -> None:
    values: dict[str, object] = {"run_dir": config.run_dir} | changes
    with pytest.raises(ValueError, match=message):
        list(generate(GenerateConfig(**values)))  # type: ignore[arg-type]
