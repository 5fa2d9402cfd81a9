"""Tokens per second and core of `thrifty prepare` against `datasets.map` with the same tokenizer.

    python -m bench.prepare [MEGABYTES]

Both read the same jsonl with one worker process and leave tokens on disk: ours as shards with
hashes, index and report, theirs as an Arrow file. The tokenizer is trained beforehand. The two take
turns, each time as a process of its own, imports included. CPU time of the process and its workers
is compared, which other work on the machine disturbs less than it does a clock.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from data.config import StdlibData
from data.corpus import read_documents
from data.tokenizer import TokenizerConfig
from data.train_tokenizer import sample_passages, train_tokenizer

ROUNDS = 3

OURS = """
from data.config import FilesData
from data.prepare import prepare
from data.tokenizer import TokenizerConfig
def run(source, tokenizer, out):
    given = TokenizerConfig(path=tokenizer)
    return prepare(FilesData(folder=out, paths=[source], tokenizer=given, processes=1)).manifest
def count(manifest):
    return manifest.train.tokens + manifest.validation.tokens
"""
THEIRS = """
import datasets
from pathlib import Path
from data.tokenizer import load_tokenizer
from functools import partial
datasets.disable_progress_bars()
def encode(batch, tokenizer):
    ids = [[tokenizer.bos_id, *tokenizer.encode(x), tokenizer.eos_id] for x in batch["text"]]
    return {"ids": ids}
class Lazily:
    def __init__(self, path):
        self.path, self.own = path, None
    def __call__(self, batch):
        self.own = self.own or load_tokenizer(Path(self.path))
        return encode(batch, self.own)
    def __getstate__(self):
        return {"path": self.path, "own": None}
def run(source, tokenizer, out):
    read = datasets.load_dataset("json", data_files=source, split="train", cache_dir=out)
    return read.map(
        Lazily(tokenizer), batched=True, num_proc=1, remove_columns=["text"],
        cache_file_name=out + "/tokens.arrow", load_from_cache_file=False,
    )
def count(made):
    return sum(len(ids) for batch in made.iter(1000) for ids in batch["ids"])
"""
MEASURE = """
import json, os, sys, time
import resource
if __name__ == "__main__":
    made = run(*sys.argv[1:])
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps([count(made), sum(u.ru_utime + u.ru_stime for u in used)]))
"""


def main() -> int:
    """Print both rates and their ratio."""
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 16.0
    with tempfile.TemporaryDirectory() as folder:
        source, tokenizer = Path(folder) / "text.jsonl", Path(folder) / "tokenizer.model"
        texts, size = [], 0
        every = read_documents(StdlibData(folder="unused", include_tests=True))
        for document in (document for document in every if document.text):
            texts.append(document.text.decode())
            size += document.num_bytes
            if size >= megabytes * 1e6:
                break
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = TokenizerConfig(vocab_size=8192, train_bytes=2_000_000)
        train_tokenizer(sample_passages(texts, max_bytes=config.train_bytes), config, tokenizer)
        rates: dict[str, list[float]] = {"prepare": [], "datasets.map": []}
        tokens = set()
        for number in range(ROUNDS):
            for name, script in (("prepare", OURS), ("datasets.map", THEIRS)):
                out = Path(folder) / f"{name}{number}"
                out.mkdir()
                command = [sys.executable, "-c", script + MEASURE, source, tokenizer, out]
                ended = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                counted, seconds = json.loads(ended.stdout.splitlines()[-1])
                rates[name].append(counted / seconds)
                tokens.add(counted)
    assert len(tokens) == 1, f"the two made different tokens: {tokens}"
    print(f"{size / 1e6:.1f} MB, {tokens.pop():,} tokens, {ROUNDS} rounds in turns, CPU time")
    for name, measured in rates.items():
        print(f"{name:<14}{statistics.median(measured):>12,.0f} tokens/s per core")
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    print(f"prepare against datasets.map: {statistics.median(ratios):.2f} times the rate")
    print(f"each round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
