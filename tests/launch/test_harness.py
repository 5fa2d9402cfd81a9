"""lm-evaluation-harness through the exported folder, by the commands of docs/evaluate.md."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.command import thrifty
from train.checkpoint.restore import Restored, restore
from train.ranks import alone

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
FILE = re.compile(r'^```\w+ title="(?P<path>[^"]+)"\n(?P<text>.*?)^```', re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(smoke: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files beside a trained run in runs/first and what the page's commands left."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("harness")
    page = PAGE.read_text()
    for found in FILE.finditer(page):
        path = folder / found["path"]
        path.parent.mkdir(exist_ok=True)
        path.write_text(found["text"])
    code, output = thrifty("train", *smoke, "run_dir=runs/first", cwd=folder)
    assert code == 0, output
    for line in page.splitlines():
        if line.startswith("thrifty export"):
            code, output = thrifty(*shlex.split(line)[1:], cwd=folder)
            assert code == 0, output
        if line.startswith("lm_eval run"):
            run_harness(shlex.split(line), cwd=folder)
    return folder


def run_harness(command: list[str], *, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command, "--log_samples"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(cwd / "cache"),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def restored(folder: Path) -> Restored:
    return restore(folder / "runs" / "first", ranks=alone())


@torch.no_grad()
def log_likelihood(restored: Restored, prefix: str, continuation: str) -> float:
    """Of the continuation after the start of a document and the prefix, in nats."""
    before = [restored.tokenizer.bos_id, *restored.tokenizer.encode(prefix)]
    tokens = [restored.tokenizer.bos_id, *restored.tokenizer.encode(prefix + continuation)]
    logits = restored.model.logits(torch.tensor([tokens[:-1]]))[0, len(before) - 1 :]
    wanted = torch.tensor(tokens[len(before) :])
    return -F.cross_entropy(logits, wanted, reduction="sum").item()


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_harness_gives_a_text_the_bits_per_byte_of_our_own_model(
    folder: Path, restored: Restored
) -> None:
    texts = [str(row["text"]) for row in read_lines(folder / "held_out.jsonl")]
    nats = -sum(log_likelihood(restored, "", text) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    reports = [json.loads(path.read_text()) for path in folder.rglob("results_*.json")]
    [got] = [report["results"]["held_out"] for report in reports if "held_out" in report["results"]]
    wanted = nats / num_bytes / math.log(2)
    assert got["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-4)


def test_the_harness_gives_choices_the_likelihoods_of_our_own_model(
    folder: Path, restored: Restored
) -> None:
    [samples] = folder.rglob("samples_next_word_*.jsonl")
    rows = read_lines(samples)
    assert len(rows) == len(read_lines(folder / "next_word.jsonl"))
    for row in rows:
        question: dict[str, str] = row["doc"]  # type: ignore[assignment]
        wanted = [
            log_likelihood(restored, question["question"], choice) for choice in question["choices"]
        ]
        got = [float(likelihood) for likelihood, _ in row["filtered_resps"]]  # type: ignore[attr-defined]
        assert got == pytest.approx(wanted, rel=1e-4)
