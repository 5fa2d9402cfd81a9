"""Products in FP8 and their gradients against exact products of the same numbers, in fp64."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.e5m6 import dequantise_e5m6, quantise_e5m6
from model.ffn import SwiGLU
from model.fp8 import (
    Scale,
    dequantise_blocks,
    dequantise_tiles,
    quantise_blocks,
    quantise_tiles,
)
from model.fp8_linear import Kept, linear_in_fp8
from model.fp8_swiglu import grouped_swiglu_in_fp8
from model.init import initialise
from model.linear import Linear
from model.moe import MoE, MoEConfig
from model.products import product_layers, use_fp8
from model.recompute import Recompute
from model.router import RouterConfig
from tests.model.small import packed_batch, small_config, small_model
from tests.ranks import ranks

SHAPES = [(1, 1, 1), (1, 130, 5), (129, 300, 64), (257, 127, 131)]  # rows, summed width, columns
COUNTS = [[3, 0, 130, 1], [0, 0, 0, 7], [140, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiles(x: Tensor, scale: Scale = Scale.exact) -> Tensor:
    return dequantise_tiles(quantise_tiles(x, scale)).double()


def blocks(weight: Tensor) -> Tensor:
    return dequantise_blocks(quantise_blocks(weight)).double()


def columns(x: Tensor, scale: Scale = Scale.exact) -> Tensor:
    """Rounded in tiles of 128 rows."""
    return tiles(x.float().t(), scale).t()


def assert_sums(got: Tensor, wanted: Tensor) -> None:
    """Equal but for fp32's sums."""
    error = (got.double() - wanted).abs().max()
    assert error <= 3e-6 * wanted.abs().max(), error / wanted.abs().max()


@pytest.mark.parametrize("kept", Kept)
@pytest.mark.parametrize(("rows", "width", "num_columns"), SHAPES)
def test_a_product_and_its_gradients_are_those_of_the_rounded_numbers(
    rows: int, width: int, num_columns: int, kept: Kept
) -> None:
    x, weight = randn(rows, width).requires_grad_(), randn(num_columns, width, seed=1)
    weight.requires_grad_()
    y = linear_in_fp8(x, weight, kept=kept)
    upstream = randn(rows, num_columns, seed=2)
    y.backward(upstream)
    with torch.no_grad():
        scale = Scale.exact if kept is Kept.e4m3 else Scale.power_of_two
        assert_sums(y, tiles(x, scale) @ blocks(weight).t())
        assert_sums(x.grad, tiles(upstream) @ blocks(weight))
        in_e5m6 = dequantise_e5m6(quantise_e5m6(x), width=width)
        kept_x = tiles(x) if kept is Kept.e4m3 else in_e5m6
        assert_sums(weight.grad, columns(upstream, scale).t() @ columns(kept_x, scale))


@pytest.mark.parametrize(("rows", "width", "num_columns"), SHAPES)
def test_no_result_is_further_from_the_exact_product_than_rounding_adds_up_to(
    rows: int, width: int, num_columns: int
) -> None:
    x, weight = randn(rows, width).requires_grad_(), randn(num_columns, width, seed=1)
    weight.requires_grad_()
    upstream = randn(rows, num_columns, seed=2)
    y = linear_in_fp8(x, weight)
    y.backward(upstream)
    with torch.no_grad():
        sides = ((y, x, weight.t()), (x.grad, upstream, weight), (weight.grad, upstream.t(), x))
        for got, left, right in sides:
            # 2^-4 of each factor, twice where it was kept in FP8, and what is below E4M3's range.
            relative = (1 + 2**-4) ** 3 - 1
            floor = left.abs().max() * right.abs().max() * left.shape[1] * 2 ** -(9 + 8)
            bound = relative * (left.abs() @ right.abs()) + floor
            assert ((got - left @ right).abs() <= bound).all()


def slow_swiglu(
    rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, upstream: Tensor
) -> tuple[Tensor, ...]:
    """One expert's outputs and gradients, every rounding written out; fp64 between them."""
    power = Scale.power_of_two
    x = tiles(rows, power)
    gated, upped = x @ blocks(gate).t(), x @ blocks(up).t()
    outputs = tiles((F.silu(gated) * upped).float()) @ blocks(down).t()
    gated, upped = tiles(gated.float()), tiles(upped.float())
    arrived = tiles(upstream, power)
    d_inner = arrived @ blocks(down)
    gated.requires_grad_()
    with torch.enable_grad():
        inner = F.silu(gated) * upped
        (d_gated,) = torch.autograd.grad(inner, gated, d_inner)
    d_upped = d_inner * F.silu(gated)
    grad_rows = tiles(d_gated.float()) @ blocks(gate) + tiles(d_upped.float()) @ blocks(up)
    grad_gate = columns(d_gated, power).t() @ columns(x, power)
    grad_up = columns(d_upped, power).t() @ columns(x, power)
    grad_down = columns(arrived, power).t() @ columns(inner, power)
    return outputs, grad_rows, grad_gate, grad_up, grad_down


@pytest.mark.parametrize("counts", COUNTS)
def test_experts_equal_a_loop_also_without_rows_and_with_odd_tails(counts: list[int]) -> None:
    dim, inner_dim = 130, 70
    rows = randn(sum(counts), dim).requires_grad_()
    shapes = [(4, inner_dim, dim), (4, inner_dim, dim), (4, dim, inner_dim)]
    weights = [randn(*shape, seed=i + 1).div(8).requires_grad_() for i, shape in enumerate(shapes)]
    upstream = randn(sum(counts), dim, seed=9)
    outputs = grouped_swiglu_in_fp8(rows, *weights, counts=counts)
    grads = torch.autograd.grad(outputs, (rows, *weights), upstream)
    with torch.no_grad():
        runs = zip(rows.split(counts), *weights, upstream.split(counts), strict=True)
        wanted = [slow_swiglu(*of_expert) if len(of_expert[0]) else None for of_expert in runs]
    runs = zip(outputs.split(counts), grads[0].split(counts), *grads[1:], strict=True)
    for got, expected in zip(runs, wanted, strict=True):
        if expected is None:
            assert not any(grad.any() for grad in got)
            continue
        for one, other in zip(got, expected, strict=True):
            # A last bit in fp32 may turn a tie in FP8: one number a step of 2^-3 away.
            assert (one - other).norm() <= 2e-3 * other.norm()
            assert ((one - other).abs() > 1e-5 * other.abs().max()).float().mean() < 0.05


def test_numbers_of_any_size_are_rounded_alike() -> None:
    x, weight = randn(40, 200), randn(30, 200, seed=1)
    y = linear_in_fp8(x, weight)
    for power in (-60, 60):
        assert torch.equal(linear_in_fp8(x * 2.0**power, weight) * 2.0**-power, y)
        assert torch.equal(linear_in_fp8(x, weight * 2.0**power) * 2.0**-power, y)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_row_stays_alone_and_is_never_hidden(poison: float) -> None:
    rows = randn(9, 130)
    weights = [randn(3, 70, 130), randn(3, 70, 130, seed=1), randn(3, 130, 70, seed=2)]
    clean = grouped_swiglu_in_fp8(rows, *weights, counts=[4, 0, 5])
    rows[5, 7] = poison
    weights = [weight.requires_grad_() for weight in weights]
    got = grouped_swiglu_in_fp8(rows, *weights, counts=[4, 0, 5])
    assert not got[5].isfinite().any()
    others = torch.arange(9) != 5
    assert torch.equal(got[others], clean[others])
    got.sum().backward()
    for weight in weights:
        assert weight.grad[:2].isfinite().all()
        assert not weight.grad[2].isfinite().all()


def test_embedding_head_router_norms_and_attention_itself_never_are_in_fp8() -> None:
    model = small_model(small_config(mtp_depth=1))
    layers = product_layers(model)
    parameters = {
        name if not inner else f"{name}.{inner}"
        for name, layer in layers.items()
        for inner, _ in layer.named_parameters()
    }
    rest = {name for name, _ in model.named_parameters()} - parameters
    assert rest == {
        name
        for name, _ in model.named_parameters()
        if name in ("embed.weight", "head.weight")
        or name.endswith(("norm.weight", "router.weight"))
    }
    use_fp8(model, but=["layers.1.ffn.experts"])
    assert {name for name, layer in layers.items() if not layer.is_fp8} == {"layers.1.ffn.experts"}


def loss_and_gradients(**settings: Any) -> tuple[Tensor, list[Tensor]]:
    model = small_model(small_config(mtp_depth=1), **settings)
    use_fp8(model)
    sums = model(*packed_batch([[9, 3], [12]]), segments=[9, 3, 12])
    loss = sums.loss + sums.mtp_loss.sum()
    return loss, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize(
    "settings",
    [{"recompute": Recompute.selective}, {"recompute": Recompute.full}, {"offloads": True}],
)
def test_recomputed_and_offloaded_products_are_the_same_to_the_bit(
    settings: dict[str, Any],
) -> None:
    loss, grads = loss_and_gradients()
    loss_then, grads_then = loss_and_gradients(**settings)
    assert torch.equal(loss, loss_then)
    for grad, grad_then in zip(grads, grads_then, strict=True):
        assert grad is grad_then is None or torch.equal(grad, grad_then)


def test_a_linear_keeps_its_input_in_one_byte_or_in_twelve_bits() -> None:
    for kept, num_bytes in ((Kept.e4m3, 256), (Kept.e5m6, 384)):
        layer = Linear(256, 8, kept=kept)
        layer.is_fp8 = True
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x) or x, lambda x: x
        ):
            layer(randn(10, 256).requires_grad_())
        values, scales, weight = saved
        assert values.nbytes == 10 * num_bytes
        assert scales.shape == (10, 2)
        assert weight.data_ptr() == layer.weight.data_ptr()


def test_swiglu_keeps_three_bytes_a_number_at_most() -> None:
    ffn = SwiGLU(128, 256)
    ffn.is_fp8 = True
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ffn(randn(10, 128).requires_grad_())
    held = {id(parameter.untyped_storage()) for parameter in ffn.parameters()}
    values = [x for x in saved if x.dtype == torch.float8_e4m3fn]
    assert sum(x.nbytes for x in values) == 10 * (128 + 2 * 256)
    scales = [x for x in saved if x.ndim == 2 and x.dtype == torch.float32]
    assert sum(x.nbytes for x in scales) == 10 * (1 + 2 * 2) * 4
    assert len(saved) == len(values) + len(scales) + len(held)


CONFIG = MoEConfig(
    num_experts=8, top_k=3, expert_dim=140, num_shared_experts=2, router=RouterConfig()
)


def make_moe(*, group: dist.ProcessGroup | None = None) -> MoE:
    moe = MoE(CONFIG, dim=150, expert_group=group)
    initialise(moe, seed=3, std=0.1)
    moe.bfloat16()
    use_fp8(moe)
    return moe


def run_moe(moe: MoE, x: Tensor) -> Tensor:
    hidden = moe(x, torch.ones(x.shape[:2], dtype=torch.bool)).hidden
    hidden.backward(randn(*x.shape, seed=100).to(x.dtype))
    return hidden


@ranks(2)
def test_experts_over_two_ranks_give_the_same_bits_and_rows_travel_in_fp8() -> None:
    xs = [randn(1, 40, 150, seed=rank).bfloat16().requires_grad_() for rank in range(2)]
    local = make_moe()
    wanted = [run_moe(local, x) for x in xs]

    spread = make_moe(group=dist.group.WORLD)
    x = xs[dist.get_rank()].detach().requires_grad_()
    messages: list[tuple[torch.dtype, int]] = []
    exchange = dist.all_to_all_single

    def note(arrived: Tensor, rows: Tensor, *rest: Any, **more: Any) -> Any:
        messages.append((rows.dtype, rows.shape[1]))
        return exchange(arrived, rows, *rest, **more)

    dist.all_to_all_single = note
    hidden = run_moe(spread, x)
    dispatched, combined = (torch.uint8, 150 + 2), (torch.bfloat16, 150)
    assert messages == [dispatched, combined, dispatched, combined]
    assert torch.equal(hidden, wanted[dist.get_rank()])
    assert torch.equal(x.grad, xs[dist.get_rank()].grad)
    first = spread.experts.first
    for name, parameter in spread.experts.named_parameters():
        whole = local.experts.get_parameter(name).grad
        mine = whole[first : first + 4]
        # Tiles of rows are others where other rows are beside them.
        assert (parameter.grad - mine).float().norm() <= 1e-2 * mine.float().norm()
