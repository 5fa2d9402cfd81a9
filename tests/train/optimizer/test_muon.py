"""Muon: torch's own on whole matrices, and the same on flat parts that cut them anywhere."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from model.transformer import Transformer
from tests.ranks import run_ranks
from tests.train.tiny import tiny_model, tiny_run
from tests.train.trained import Trained, assert_same_training, train_layout
from train.config import check_run
from train.layout.parallel import ParallelConfig
from train.optimizer.config import Algorithm, MuonConfig, algorithm_of, parameter_groups
from train.optimizer.matrix_parts import MatrixParts, matrices_of
from train.optimizer.moments import Moments
from train.optimizer.muon import AdjustLR, Muon, MuonSettings, orthogonalise
from train.precision import Dtype

SHAPES = ((30, 20), (20, 30), (16, 16), (1, 40))
EXACT = MuonConfig(iterate_in=Dtype.fp32)


def matrices(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def muon_over(parameters: Any, **settings: Any) -> Muon:
    groups = [{"params": parameters, "algorithm": "muon"}]
    of_muon = {k: settings.pop(k) for k in MuonSettings._fields if k in settings}
    return Muon(groups, muon=MuonSettings(**of_muon), **settings)


def error_of(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": False, "weight_decay": 0.0},
        {"momentum": 0.8, "ns_steps": 3, "adjust_lr": AdjustLR.match_rms_adamw},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_whole_matrices_it_is_torchs_muon(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """In fp32 torch's iteration, which it always runs in BF16, is kept from casting."""
    theirs = dict(settings)
    if "adjust_lr" in theirs:
        theirs["adjust_lr_fn"] = theirs.pop("adjust_lr").value
    expected, got = matrices(*SHAPES), matrices(*SHAPES)
    reference = torch.optim.Muon(expected, lr=0.02, **theirs)
    optimizer = muon_over(got, lr=0.02, dtype=dtype, **settings)
    for seed in range(4):
        step(optimizer, seed)
        with mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor.to(dtype).clone()):
            step(reference, seed)
    for one, other in zip(got, expected, strict=True):
        assert error_of(one.detach(), other.detach()) <= 1e-5


def test_the_experts_of_a_stack_are_matrices_each_of_its_own() -> None:
    (stack,) = matrices((3, 12, 8))
    each = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together, alone = muon_over([stack], lr=0.02), muon_over(each, lr=0.02)
    for seed in range(3):
        step(together, seed)
        for matrix, grad in zip(each, stack.grad if stack.grad is not None else [], strict=True):
            matrix.grad = grad
        alone.step()
    assert error_of(stack.detach(), torch.stack([m.detach() for m in each])) <= 1e-5


def test_an_orthogonalised_matrix_has_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, 40, 24), steps=5))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("size_of_part", [452, 500, 2000])
def test_flat_parts_that_cut_matrices_anywhere_step_like_whole_ones(size_of_part: int) -> None:
    """Four ranks share a row of matrices: one lies in three parts, one part is all padding."""
    shapes = ((60, 20), (4, 10, 6), (9, 13), (25, 7), (3, 5, 5))
    padded = 4 * size_of_part

    def be_rank() -> Tensor:
        rank = torch.distributed.get_rank()
        whole = matrices(*shapes)
        row = torch.cat([parameter.detach().view(-1) for parameter in whole])[:padded]
        part = slice(rank * size_of_part, (rank + 1) * size_of_part)
        filled = torch.zeros(padded)
        filled[: len(row)] = row
        flat = nn.Parameter(filled[part].clone())
        placed, first = [], 0
        for parameter in whole:
            if first < part.stop and first + parameter.numel() > part.start:
                placed.append(matrices_of(parameter, start=first - part.start))
            first += parameter.numel()
        optimizer = muon_over([flat], lr=0.02, dtype=torch.float32)
        group = torch.distributed.group.WORLD
        parts = MatrixParts(placed, size=size_of_part, group=group)
        assert len(parts.cut) <= 2
        optimizer.place(flat, parts)
        reference = muon_over(whole, lr=0.02, dtype=torch.float32)
        for seed in range(3):
            step(reference, seed)
            grads = torch.cat([p.grad.view(-1) for p in whole if p.grad is not None])
            filled.zero_()[: len(row)] = grads[: len(row)]
            flat.grad = filled[part].clone()
            optimizer.step()
        expected = torch.cat([parameter.detach().view(-1) for parameter in whole])
        got = flat.detach()[: max(len(expected) - part.start, 0)]
        return (got - expected[part]).abs().max() if len(got) else torch.zeros(())

    assert all(error <= 1e-6 for error in run_ranks(4, be_rank))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_layout(tmp_path_factory.mktemp("muon"), 1, optimizer=EXACT)


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        pytest.param(2, {"zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 1}, marks=pytest.mark.slow),
        (2, {"zero_stage": 1, "expert": 2}),
        (2, {"zero_stage": 2, "expert": 2, "accumulation": 2}),
        pytest.param(4, {"zero_stage": 2, "expert": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"pipeline": 2, "accumulation": 4}, marks=pytest.mark.slow),
        pytest.param(4, {"pipeline": 2, "expert": 2, "accumulation": 4}, marks=pytest.mark.slow),
        pytest.param(2, {"sequence": 2, "expert": 2, "zero_stage": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_layout_trains_with_muon_as_one_rank_does(
    tmp_path: Path, one_rank: Trained, num_ranks: int, layout: dict[str, Any]
) -> None:
    assert_same_training(train_layout(tmp_path, num_ranks, optimizer=EXACT, **layout), one_rank)
    kinds = {name.split("/")[0] for name in one_rank.state}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "momentum", "buffer"}


def test_gradients_are_clipped_before_the_momentum_and_the_step_is_not(tmp_path: Path) -> None:
    """A clip of a hundredth shrinks the momentum by as much, and the first step not at all."""
    states = []
    for clip_norm in (1.0, 0.01):
        config = MuonConfig(iterate_in=Dtype.fp32, clip_norm=clip_norm, weight_decay=0.0)
        with mock.patch("tests.train.trained.STEPS", 1):
            states.append(train_layout(tmp_path, 2, optimizer=config, expert=2))
    full, clipped = states
    assert full.norms[0] > 1
    name = "layers.1.ffn.experts.down"
    ratio = full.state[f"momentum/{name}"].norm() / clipped.state[f"momentum/{name}"].norm()
    assert float(ratio) == pytest.approx(100, rel=1e-4)
    assert error_of(clipped.state[f"weight/{name}"], full.state[f"weight/{name}"]) < 1e-5


def test_muon_moves_the_maps_between_hidden_states_and_adamw_the_rest() -> None:
    model = Transformer(tiny_model())
    moved = {
        algorithm: {n for n, _ in model.named_parameters() if algorithm_of(n, EXACT) is algorithm}
        for algorithm in Algorithm
    }
    adamw = {n for n, p in model.named_parameters() if p.ndim < 2}
    adamw |= {"embed.weight", "head.weight"} | {n for n in moved[Algorithm.adamw] if "router" in n}
    assert moved[Algorithm.adamw] == adamw
    assert {"layers.1.ffn.experts.up", "layers.0.attention.kv_up.weight"} < moved[Algorithm.muon]
    assert sum("router" in name for name in adamw) == 3
    decays = {group["name"]: group["weight_decay"] for group in parameter_groups(model, EXACT)}
    assert decays == {"adamw, decayed": 0.1, "adamw, undecayed": 0.0, "muon, decayed": 0.1}


def test_a_matrix_without_gradient_only_decays() -> None:
    (matrix,) = matrices((6, 5))
    before = matrix.detach().clone()
    optimizer = muon_over([matrix], lr=0.1, weight_decay=0.5)
    matrix.grad = torch.zeros_like(matrix)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(("moments", "bytes_each"), [(Moments.fp32, 4), (Moments.bf16, 2)])
def test_bytes_per_parameter_of_the_momentum(moments: Moments, bytes_each: int) -> None:
    optimizer = muon_over(matrices((100, 80)), moments=moments)
    step(optimizer, 0)
    (state,) = optimizer.state.values()
    kept = sum(value.nbytes for name, value in state.items() if name != "step")
    assert kept == bytes_each * 8000


def test_zero_3_is_refused_with_the_way_out(tmp_path: Path) -> None:
    parallel = ParallelConfig(micro_batch_size=4, zero_stage=3)
    config = tiny_run(tmp_path, optimizer=MuonConfig(), parallel=parallel)
    message = r"parallel.zero_stage=3 and optimizer.kind=muon .*choose parallel.zero_stage=2"
    with pytest.raises(ValueError, match=message):
        check_run(config, num_ranks=1)
