"""compile=true changes no more than rounding, says what it compiles, and is refused early."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.compiled import check_compiler
from model.config import ModelConfig
from model.recompute import Recompute
from tests.train.test_sequence import grouped_heads
from tests.train.tiny import tiny_model, tiny_moe, tiny_run
from train.config import CONFIG_FILE, RunConfig, check_run, write_config
from train.journal import read_records
from train.layout.parallel import ParallelConfig


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no no-such-compiler; .* choose compile=false"):
        check_compiler(torch.device("cpu"))


def test_it_is_refused_beside_a_reduction_on_a_stream_of_its_own(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, parallel=ParallelConfig(micro_batch_size=4, overlap_comm=True))
    check_run(config, num_ranks=1)
    config.compile = True
    with pytest.raises(ValueError, match=r"compile=true and parallel\.overlap_comm=true"):
        check_run(config, num_ranks=1)


# Run without the shape checks of the tests, which torch.compile can't trace.
REGION = """
from functools import partial
from itertools import product
import torch, torch.nn.functional as F
from model import compiled
from model.ffn import gate_product

torch.compile = partial(torch.compile, backend="aot_eager")
compiled.check_compiler = lambda device: None
compiled.compile_regions(True, device=torch.device("cpu"), dtype=torch.float32)
shapes = [(4, 64, 96), (40, 32), (0, 32), (1, 32), (1, 1, 96)]
for shape, has_grad in product(shapes, [True, False]):
    gated, upped = (torch.randn(shape, requires_grad=has_grad) for _ in range(2))
    with torch.set_grad_enabled(has_grad):
        got = gate_product(gated, upped)
    assert torch.equal(got, F.silu(gated) * upped), shape
    if has_grad:
        got.sum().backward()
"""


@pytest.mark.slow
def test_a_region_takes_more_kinds_of_shapes_than_torch_makes_graphs_for_by_default() -> None:
    """Dense rows, experts' rows, none or one of them, with and without gradients."""
    command = [sys.executable, "-c", REGION]
    subprocess.run(command, check=True, timeout=600, cwd=Path(__file__).parents[2])


def train(config: RunConfig, corpus: Path) -> tuple[list[float], str]:
    """Losses of the steps, and what the run said."""
    config.data.folder = str(corpus)
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True)
    write_config(config, run_dir / CONFIG_FILE)
    command = [sys.executable, "-m", "train", str(run_dir)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    losses = [record["loss"] for record in read_records(run_dir, event="step")]
    return losses, ended.stdout + ended.stderr


def latent_attention() -> ModelConfig:
    return tiny_model(moe=tiny_moe(max_tokens_per_chunk=100))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (latent_attention, {"zero_stage": 1, "recompute": Recompute.selective}),
        (latent_attention, {"zero_stage": 3}),
        (grouped_heads, {"zero_stage": 0, "recompute": Recompute.full}),
    ],
)
def test_compiled_training_equals_the_plain_one(
    corpus: Path, tmp_path: Path, model: Callable[[], ModelConfig], layout: dict[str, Any]
) -> None:
    parallel = ParallelConfig(micro_batch_size=4, **layout)
    plain = tiny_run(tmp_path / "plain", model=model(), parallel=parallel)
    wanted, _ = train(plain, corpus)
    compiled = replace(plain, run_dir=str(tmp_path / "compiled"), compile=True)
    losses, said = train(compiled, corpus)
    assert "gate_product: graphs 1, breaks 0" in said
    assert "rotate_halves: graphs 1, breaks 0" in said
    assert len(losses) == len(wanted) == 6
    assert losses == pytest.approx(wanted, rel=1e-5)
