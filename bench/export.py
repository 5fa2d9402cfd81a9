"""`python -m bench.export`: host memory that exporting and importing a 2-GB model takes.

A checkpoint of random weights is written as a stream, exported in BF16 and imported again, each in
a process of its own. Counted is the peak of resident memory over what the process held with all
modules loaded. The gate is off: it needs the model in memory, and asks first whether it fits.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data.config import FilesData
from data.tokenizer import TokenizerConfig, load_tokenizer
from data.train_tokenizer import sample_passages, train_tokenizer
from model.config import MLAModelConfig, MTPConfig
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.router import RouterConfig
from model.transformer import Transformer
from train.checkpoint.checkpoints import FOLDER
from train.checkpoint.manifest import (
    Manifest,
    Part,
    Piece,
    StoredTensor,
    merge_runs,
    write_manifest,
)
from train.checkpoint.tensor_stream import TensorSpec, write_stream
from train.config import CONFIG_FILE, RunConfig, write_config
from train.hub.export import ExportConfig, export
from train.hub.import_weights import import_weights
from train.layout.parallel import ParallelConfig
from train.schedule import ConstantSchedule

MODEL = MLAModelConfig(
    vocab_size=32_000,
    dim=2048,
    num_layers=8,
    ffn_dim=5632,
    attention=MLAConfig(
        num_heads=16,
        q_lora_rank=512,
        kv_lora_rank=512,
        nope_head_dim=64,
        rope_head_dim=32,
        v_head_dim=64,
    ),
    moe=MoEConfig(num_experts=14, top_k=4, expert_dim=1280, router=RouterConfig()),
    mtp=MTPConfig(depth=1),
)
FILE = "rank-00000.safetensors"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder)
        out = folder / "hub"
        for task in ("export", "import"):
            arguments = [sys.executable, "-m", "bench.export", task, str(folder)]
            print(f"{task:8}", flush=True, end="")
            subprocess.run(arguments, check=True, stderr=subprocess.DEVNULL)
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        largest = MODEL.vocab_size * MODEL.dim * 4
        print(
            f"folder   {size / 1e9:.2f} GB in BF16; largest tensor {largest / 1e6:.0f} MB in fp32"
        )


def measure(task: str, folder: Path) -> None:
    """Do one of the two in this process, and print what it took."""
    config, out = make_config(folder), folder / "hub"
    before, start = peak_memory(), time.perf_counter()
    if task == "export":
        export(ExportConfig(run_dir=config.run_dir, out=str(out), gate=False))
    else:
        config.run_dir = str(folder / "imported")
        import_weights(out, config)
    seconds = time.perf_counter() - start
    extra = peak_memory() - before
    print(f" {extra / 1e6:6.0f} MB above the {before / 1e6:.0f} MB held before; {seconds:.0f} s")


def peak_memory() -> int:
    """Most bytes of main memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_config(folder: Path) -> RunConfig:
    tokenizer = TokenizerConfig(path=str(folder / "corpus" / "tokenizer.model"))
    return RunConfig(
        run_dir=str(folder / "run"),
        model=MODEL,
        data=FilesData(folder=str(folder / "corpus"), paths=["*"], tokenizer=tokenizer),
        schedule=ConstantSchedule(steps=1, batch_size=1, peak_lr=1e-3),
        parallel=ParallelConfig(micro_batch_size=1),
    )


def make_run(folder: Path) -> None:
    """A run with a tokenizer and a checkpoint of random weights, without optimizer state."""
    config = make_config(folder)
    step = Path(config.run_dir) / FOLDER / "step-00000001"
    for path in (step, Path(config.data.folder)):
        path.mkdir(parents=True)
    write_config(config, Path(config.run_dir) / CONFIG_FILE)
    tokenizer = Path(config.data.folder) / "tokenizer.model"
    passages = sample_passages(
        [path.read_text() for path in Path("bench").glob("*.py")], max_bytes=50_000
    )
    train_tokenizer(passages, TokenizerConfig(vocab_size=400), tokenizer)

    with torch.device("meta"):
        model = Transformer(MODEL)
    shapes = {f"weight/{name}": p.shape for name, p in model.named_parameters()}
    shapes |= {f"buffer/{name}": b.shape for name, b in model.named_buffers()}
    specs = [TensorSpec(f"{n}@0", torch.float32, (shape.numel(),)) for n, shape in shapes.items()]
    values = (torch.empty(spec.shape).normal_(std=0.02) for spec in specs)
    stored = write_stream(step / FILE, specs, values, advance=lambda _: None)
    runs = [
        (name, StoredTensor(tuple(shape), "float32", [Piece(FILE, 0, shape.numel())]))
        for name, shape in shapes.items()
    ]
    manifest = Manifest(
        step=1,
        progress={},
        tokenizer=load_tokenizer(tokenizer).fingerprint,
        layout={},
        versions={},
        config={},
        tensors=merge_runs([Part(FILE, stored, runs)]),
        files={FILE: stored},
    )
    write_manifest(step, manifest)


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
