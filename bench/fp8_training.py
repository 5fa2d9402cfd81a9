"""`python -m bench.fp8_training`: does FP8 train as BF16 does? 110M parameters on real text.

The bytes of Python's standard library, the same batches for both precisions, from the same weights,
each trained alone: the mean loss of the last 50 steps, and the time of a step. `--steps N` (400,
and 20 of a small model on the CPU).
"""

import argparse
import math
import statistics
import sysconfig
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.one_process import Trainee
from bench.rows import Row, note
from bench.sizes import Sizes
from bench.timing import prepare, seconds
from model.config import ModelConfig
from model.cost import count_parameters
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.router import RouterConfig

PEAK_LR, WARM_UP = 1e-3, 40
COMPARED = 50  # last steps, of which the mean is taken
GOAL = 0.0025


def sizes_for(device: torch.device) -> Sizes:
    is_small = device.type == "cpu"
    model = ModelConfig(
        vocab_size=256,
        dim=64 if is_small else 512,
        num_layers=2 if is_small else 8,
        ffn_dim=96 if is_small else 1408,
        attention=MLAConfig(
            num_heads=2 if is_small else 8,
            q_lora_rank=None,
            kv_lora_rank=32 if is_small else 256,
            nope_head_dim=16 if is_small else 64,
            rope_head_dim=8 if is_small else 32,
            v_head_dim=16 if is_small else 64,
        ),
        moe=MoEConfig(
            num_experts=8 if is_small else 64,
            top_k=2 if is_small else 6,
            expert_dim=32 if is_small else 160,
            router=RouterConfig(),
        ),
    )
    return Sizes(model, batch_size=2 if is_small else 16, seq_len=64 if is_small else 1024)


def read_text() -> Tensor:
    """The standard library's sources, one after another, as bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py"))
    return torch.frombuffer(bytearray(b"\n".join(p.read_bytes() for p in files)), dtype=torch.uint8)


class Curve(NamedTuple):
    losses: list[float]
    step_seconds: float  # median


def train(sizes: Sizes, text: Tensor, steps: int, device: torch.device, *, is_fp8: bool) -> Curve:
    trainee = Trainee(sizes.model, device, dtype=torch.bfloat16, is_fp8=is_fp8)
    generator = torch.Generator().manual_seed(1)
    losses, times = [], []
    for step in range(steps):
        starts = torch.randint(
            len(text) - sizes.seq_len - 1, (sizes.batch_size,), generator=generator
        )
        rows = [text[start : start + sizes.seq_len + 1] for start in starts.tolist()]
        tokens = torch.stack(rows).long().to(device)
        progress = step / steps
        lr = PEAK_LR * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))
        times.append(seconds(lambda: losses.append(trainee.step(tokens, lr=lr))))  # noqa: B023
    return Curve([float(loss) for loss in losses], statistics.median(times))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    device = prepare()
    options.add_argument("--steps", type=int, default=400 if device.type == "cuda" else 20)
    steps = options.parse_args().steps
    sizes, text = sizes_for(device), read_text()
    parameters = count_parameters(sizes.model).total / 1e6
    curves = {
        name: train(sizes, text, steps, device, is_fp8=name == "FP8") for name in ("BF16", "FP8")
    }
    borders = range(0, steps + 1, max(1, steps // 8))
    for start, end in pairwise(borders):
        means = {name: statistics.fmean(c.losses[start:end]) for name, c in curves.items()}
        print(
            f"steps {start + 1:>4} to {end:>4}: "
            + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        )
    bf16, fp8 = (statistics.fmean(c.losses[-COMPARED:]) for c in curves.values())
    what = f"{parameters:.0f}M parameters, {sizes.batch_size} x {sizes.seq_len} bytes a step"
    note(
        Row(
            f"loss after {steps} steps, mean of the last {min(COMPARED, steps)}: {what}",
            f"FP8 {fp8:.4f}",
            f"BF16 {bf16:.4f}",
            f"{fp8 / bf16 - 1:+.2%} (goal: within {GOAL:.2%})",
        )
    )
    slow, fast = (curve.step_seconds for curve in curves.values())
    note(
        Row(
            f"a training step: {what}",
            f"FP8 {fast * 1e3:.1f} ms",
            f"BF16 {slow * 1e3:.1f} ms",
            f"{slow / fast:.2f} times as fast",
        )
    )


if __name__ == "__main__":
    main()
