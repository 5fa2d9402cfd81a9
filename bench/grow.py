"""`python -m bench.grow`: host memory that growing a model of 0.2 GB takes.

A checkpoint of random weights and both moments is grown from 16 to 32 experts in a fresh process,
its function measured on real text. Counted is the peak of resident memory over what the process
held with all modules loaded, beside the bytes of what is streamed.
"""

import math
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.checkpoint import read_memory
from data.config import FilesData
from data.prepare import prepare, tokenizer_path
from data.tokenizer import TokenizerConfig, load_tokenizer
from model.config import MLAModelConfig, ModelConfig
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.router import RouterConfig
from model.transformer import Transformer
from train.checkpoint.stored_tensors import open_checkpoint
from train.checkpoint.stream_checkpoint import Run, write_checkpoint
from train.config import CONFIG_FILE, RunConfig, write_config
from train.grow.config import GrowChoices
from train.grow.run import grow
from train.layout.parallel import ParallelConfig
from train.schedule import ConstantSchedule

MODEL = MLAModelConfig(
    vocab_size=8_000,
    dim=512,
    num_layers=6,
    ffn_dim=1408,
    attention=MLAConfig(
        num_heads=8,
        q_lora_rank=256,
        kv_lora_rank=256,
        nope_head_dim=64,
        rope_head_dim=32,
        v_head_dim=64,
    ),
    moe=MoEConfig(num_experts=16, top_k=4, expert_dim=352, router=RouterConfig()),
)
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            extra = pool.apply(measure, (folder,))
        grown = open_checkpoint(folder / "grown", step=None).manifest
        written = sum(stored.num_bytes for stored in grown.files.values())
    block = largest_block(widened())
    print(f"written      {written / 1e6:6.0f} MB: masters and both moments")
    print(f"largest part {block / 1e6:6.0f} MB: the embedding, or a block, of the grown model")
    print(f"at the peak  {extra / 1e6:6.0f} MB above what the process held before")


def measure(folder: Path) -> int:
    """Grow in this process; bytes by which its peak exceeds what it held before."""
    old = make_config(folder)
    new = replace(old, model=widened(), run_dir=str(folder / "grown"))
    before = read_memory("VmRSS")
    choices = GrowChoices(sequences=1)
    grow(Path(old.run_dir), old, new, choices, report=lambda _: None)
    return read_memory("VmHWM") - before


def widened() -> ModelConfig:
    assert MODEL.moe is not None
    return replace(MODEL, moe=replace(MODEL.moe, num_experts=2 * MODEL.moe.num_experts))


def largest_block(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Transformer(config)
    parts = [*model.layers, model.embed]
    return max(sum(p.nbytes for p in part.parameters()) for part in parts)


def make_config(folder: Path) -> RunConfig:
    data = FilesData(
        folder=str(folder / "corpus"),
        paths=[str(Path(__file__).parent / "*.py")],
        tokenizer=TokenizerConfig(vocab_size=400),
        seq_len=256,
        validation_fraction=0.3,
        processes=1,
    )
    return RunConfig(
        run_dir=str(folder / "run"),
        model=MODEL,
        data=data,
        schedule=ConstantSchedule(steps=1, batch_size=1, peak_lr=1e-3),
        parallel=ParallelConfig(micro_batch_size=1),
    )


def make_run(folder: Path) -> None:
    """A run with a corpus and a checkpoint of random state."""
    config = make_config(folder)
    prepare(config.data)
    Path(config.run_dir).mkdir()
    write_config(config, Path(config.run_dir) / CONFIG_FILE)
    with torch.device("meta"):
        model = Transformer(MODEL)
    shapes = {f"{kind}/{n}": p.shape for kind in KINDS for n, p in model.named_parameters()}
    shapes |= {f"buffer/{name}": buffer.shape for name, buffer in model.named_buffers()}
    about = {key: {} for key in ("progress", "layout", "versions", "config")}
    tokenizer = load_tokenizer(tokenizer_path(config.data)).fingerprint
    runs = [
        Run(name, tuple(shape), 0, math.prod(shape), torch.float32, random_of(shape))
        for name, shape in shapes.items()
    ]
    write_checkpoint(Path(config.run_dir), runs, {**about, "step": 1, "tokenizer": tokenizer})


def random_of(shape: torch.Size) -> Callable[[], Tensor]:
    return lambda: torch.empty(shape).normal_(std=0.02)


if __name__ == "__main__":
    main()
