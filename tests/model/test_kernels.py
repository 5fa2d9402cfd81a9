"""Triton kernels equal their plain references: in its interpreter, or on a GPU where there is one.

`pip install 'thrifty[kernels]'`; without triton these tests are skipped.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from model import fp8, fp8_linear, fp8_operations, fp8_swiglu
from model.fp8 import Quantised, Scale
from model.fp8_operations import REFERENCE
from tests.model.triton_devices import ON_DEVICES, kernel, randn

pytestmark = ON_DEVICES

COUNTS = [[3, 0, 70, 1], [0, 0, 0, 7], [140, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


def assert_quantised(got: Quantised, wanted: Quantised, *, ulps: int = 0) -> None:
    """Equal scales, and codes of E4M3 so many numbers apart at most."""
    rtol = 0 if ulps == 0 else 1e-6
    torch.testing.assert_close(got.scales.cpu(), wanted.scales, rtol=rtol, atol=0, equal_nan=True)
    codes, wanted_codes = (tiles.values.cpu().view(torch.uint8).int() for tiles in (got, wanted))
    if codes.numel():
        assert ((codes & 0x7F) - (wanted_codes & 0x7F)).abs().max() <= ulps


def assert_sums(got: Tensor, wanted: Tensor, of_magnitudes: Tensor) -> None:
    """Within what sums of products so large round to. Hopper adds up FP8 products with 14 bits
    (arXiv:2412.19437, 3.5.2), the interpreter in fp32."""
    bits = 11 if got.is_cuda else 20
    assert ((got.cpu() - wanted).abs() <= of_magnitudes * 2**-bits).all()


def magnitudes(tiles: Quantised) -> Quantised:
    return Quantised(tiles.values.float().abs().to(fp8.E4M3), tiles.scales)


def to(tiles: Quantised, device: str) -> Quantised:
    return Quantised(*(part.to(device) for part in tiles))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("shape", [(5, 300), (1, 1), (17, 128), (0, 130), (2, 3, 129)])
def test_quantised_tiles_are_the_references_to_the_bit(
    device: str, shape: tuple[int, ...], scale: Scale, dtype: torch.dtype
) -> None:
    exponents = torch.empty(*shape[:-1], 1).uniform_(-35, 35, generator=torch.manual_seed(1))
    x = (randn(*shape) * 10**exponents).to(dtype)
    got = kernel("quantise").quantise_tiles(x.to(device), scale)
    assert_quantised(got, fp8.quantise_tiles(x, scale))


@pytest.mark.parametrize("scale", Scale)
def test_tiles_of_a_transposed_matrix_and_of_zeros_nan_and_infinity(
    device: str, scale: Scale
) -> None:
    x = randn(150, 6)
    x[3, 1], x[140, 2], x[7, 4] = math.nan, math.inf, -math.inf
    x[:, 5] = 0
    x[:128, 0] = 1e-42
    wanted = fp8.quantise_tiles(x.t(), scale)
    got = kernel("quantise").quantise_tiles(x.to(device).t(), scale)
    torch.testing.assert_close(got.scales.cpu(), wanted.scales, rtol=0, atol=0, equal_nan=True)
    values = (fp8.dequantise_tiles(tiles).cpu() for tiles in (got, wanted))
    torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("shape", [(128, 128), (1, 5), (2, 129, 130)])
def test_quantised_blocks_are_the_references_to_the_bit(
    device: str, shape: tuple[int, ...], scale: Scale
) -> None:
    weight = randn(*shape)
    weight[..., 0, 0] = 0
    got = kernel("quantise").quantise_blocks(weight.to(device), scale)
    assert_quantised(got, fp8.quantise_blocks(weight, scale))
    turned = kernel("quantise").quantise_blocks(weight.to(device).mT, scale)
    assert_quantised(turned, fp8.quantise_blocks(weight.mT, scale))


@pytest.mark.parametrize("rows", [0, 1, 19])
def test_swiglus_gradients_in_one_pass_are_the_references(device: str, rows: int) -> None:
    gated, upped = (fp8.quantise_tiles(randn(rows, 300, seed=seed).mul(4)) for seed in (0, 1))
    upstream = randn(rows, 300, seed=2)
    got = kernel("swiglu").swiglu_backward(
        upstream.to(device), to(gated, device), to(upped, device), dtype=torch.float32
    )
    wanted = REFERENCE.swiglu_backward(upstream, gated, upped, dtype=torch.float32)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 19])
def test_swiglu_in_one_pass_is_the_references(device: str, rows: int, dtype: torch.dtype) -> None:
    gated, upped = (randn(rows, 300, seed=seed).mul(4).to(dtype) for seed in (0, 1))
    got = kernel("swiglu").swiglu_into_tiles(gated.to(device), upped.to(device))
    assert_quantised(got, REFERENCE.swiglu_into_tiles(gated, upped), ulps=1)


@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_products_are_the_references(device: str, counts: list[int]) -> None:
    columns, width = 140, 200  # neither is a multiple of 128
    blocks = fp8.quantise_blocks(randn(4, columns, width))
    for name, inner in (("grouped_multiply", width), ("grouped_multiply_transposed", columns)):
        tiles = fp8.quantise_tiles(randn(sum(counts), inner, seed=1))
        arguments = {"counts": counts, "dtype": torch.float32}
        got = getattr(kernel("grouped"), name)(to(tiles, device), to(blocks, device), **arguments)
        reference = getattr(REFERENCE, name)
        of_magnitudes = reference(magnitudes(tiles), magnitudes(blocks), **arguments)
        assert_sums(got, reference(tiles, blocks, **arguments), of_magnitudes)


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("counts", COUNTS)
def test_weights_gradients_are_the_references_and_zero_without_rows(
    device: str, counts: list[int], scale: Scale
) -> None:
    y, x = (randn(sum(counts), width, seed=width) for width in (70, 40))
    arguments = {"counts": counts, "dtype": torch.float32, "scale": scale}
    got = kernel("grouped_outer").grouped_outer(y.to(device), x.to(device), **arguments)
    of_magnitudes = REFERENCE.grouped_outer(y.abs(), x.abs(), **arguments)
    assert_sums(got, REFERENCE.grouped_outer(y, x, **arguments), of_magnitudes)
    for expert, count in enumerate(counts):
        assert count or not got[expert].any()


def test_layers_on_kernels_equal_layers_on_references(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [5, 0, 12]
    shapes = [(17, 130), (3, 70, 130), (3, 70, 130), (3, 130, 70)]
    inputs = [randn(*shape, seed=i).div(i + 1) for i, shape in enumerate(shapes)]
    upstream = randn(17, 130, seed=9)

    def results(on: str) -> list[Tensor]:
        rows, *weights = (x.detach().to(on).requires_grad_() for x in inputs)
        mixed = fp8_swiglu.grouped_swiglu_in_fp8(rows, *weights, counts=counts)
        y = fp8_linear.linear_in_fp8(mixed, weights[0][0])
        y = y @ weights[0][0].detach() + mixed
        return [y, *torch.autograd.grad(y, (rows, *weights), upstream.to(on))]

    wanted = results("cpu")
    kernels = fp8_operations.triton_operations()
    for module in (fp8_linear, fp8_swiglu):
        monkeypatch.setattr(module, "operations_on", lambda _: kernels)
    for got, expected in zip(results(device), wanted, strict=True):
        assert (got.cpu() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.slow
def test_every_kernel_compiles_for_the_gpus_it_is_for(device: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.model.compile_kernels"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sm89") == 7
    assert done.stdout.count("sm80") == 13
    assert done.stdout.count("sm90") == 7 + 13
