"""E4M3 tiles and blocks, E5M6, and the form in which rows travel, against slow references."""

import math

import pytest
import torch
from torch import Tensor

from model.e5m6 import dequantise_e5m6, quantise_e5m6
from model.fp8 import (
    E4M3,
    LARGEST,
    TILE,
    Scale,
    as_fp32,
    dequantise_blocks,
    dequantise_tiles,
    quantise_blocks,
    quantise_tiles,
)
from model.wire import decode, encode

CODES = torch.arange(256, dtype=torch.uint8).view(E4M3)
NUMBERS = sorted({abs(float(x)) for x in CODES if math.isfinite(float(x))})  # E4M3's, from 0
WIDTHS = [1, 127, 128, 129, 300]


def random_rows(*shape: int, magnitude: float = 1.0, seed: int = 0) -> Tensor:
    """Normal values whose rows differ in size by a factor of a thousand."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** torch.empty(shape[0], *[1] * (len(shape) - 1)).uniform_(
        -3, 0, generator=generator
    )
    return torch.randn(*shape, generator=generator) * spread * magnitude


def slow_scale(tile: Tensor, scale: Scale) -> float:
    largest = tile.abs().max().item()
    exact = largest / LARGEST if largest else 1.0
    return exact if scale is Scale.exact else 2.0 ** math.ceil(math.log2(exact))


def ulps(got: float, wanted: float) -> int:
    """How many of E4M3's numbers lie between one of them and the nearest to any number."""
    nearest = min(range(len(NUMBERS)), key=lambda i: abs(NUMBERS[i] - abs(wanted)))
    assert got == 0 or math.copysign(1, got) == math.copysign(1, wanted)
    return abs(NUMBERS.index(abs(got)) - nearest)


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_value_of_a_tile_is_e4m3s_nearest(width: int, scale: Scale) -> None:
    x = random_rows(3, width)
    values, scales = quantise_tiles(x, scale)
    assert scales.shape == (3, -(-width // TILE))
    for row, got, of_tiles in zip(x, values.float(), scales, strict=True):
        tiles = zip(row.split(TILE), got.split(TILE), of_tiles.tolist(), strict=True)
        for tile, got_tile, got_scale in tiles:
            wanted = slow_scale(tile, scale)
            assert got_scale == pytest.approx(wanted, rel=1e-6)
            for one, number in zip(tile.tolist(), got_tile.tolist(), strict=True):
                assert ulps(number, one / wanted) <= 1


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("shape", [(128, 128), (1, 5), (200, 300), (2, 129, 130)])
def test_a_weights_blocks_are_tiles_in_both_directions(
    shape: tuple[int, ...], scale: Scale
) -> None:
    weight = random_rows(*shape)
    blocks = quantise_blocks(weight, scale)
    shapes = (-1, *shape[-2:]), (-1, *blocks.scales.shape[-2:])
    of_matrices = (weight.view(shapes[0]), dequantise_blocks(blocks).view(shapes[0]))
    for matrix, got, scales in zip(*of_matrices, blocks.scales.view(shapes[1]), strict=True):
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                part = tuple(slice(TILE * i, TILE * i + TILE) for i in (row, column))
                assert scales[row, column].item() == pytest.approx(
                    slow_scale(matrix[part], scale), rel=1e-6
                )
                # Half a step of E4M3: 2^-4 of the value, or of its smallest normal number 2^-6.
                step = (matrix[part].abs() / 16).clamp(min=scales[row, column].item() * 2**-10)
                assert ((got[part] - matrix[part]).abs() <= step * 1.001).all()
                assert (got[part] / scales[row, column]).abs().max() > LARGEST / 2.2


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("magnitude", [1e38, 1e-30, 1e-36])
def test_huge_and_tiny_values_keep_their_precision(magnitude: float, scale: Scale) -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)).clamp(-3, 3) * magnitude
    got = dequantise_tiles(quantise_tiles(x, scale))
    assert ((got - x).abs() <= x.abs() / 15.9 + x.abs().max() / LARGEST / 500).all()


def test_values_below_fp32s_normal_range_become_zero_not_nan() -> None:
    x = torch.tensor([[1e-44, -3e-42, 0.0]])
    for scale in Scale:
        got = dequantise_tiles(quantise_tiles(x, scale))
        assert got.isfinite().all()
        assert (got.abs() <= 1e-38).all()


def test_zeros_stay_zeros_and_no_rows_stay_no_rows() -> None:
    for scale in Scale:
        tiles = quantise_tiles(torch.zeros(2, 130), scale)
        assert (tiles.scales == 1).all()
        assert not dequantise_tiles(tiles).any()
        none = quantise_tiles(torch.zeros(0, 130), scale)
        assert none.values.shape == (0, 130)
        assert dequantise_tiles(none).shape == (0, 130)


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_tile_with_nan_or_infinity_has_no_finite_number_left_and_others_keep_theirs(
    poison: float, scale: Scale
) -> None:
    x = random_rows(2, 300)
    clean = dequantise_tiles(quantise_tiles(x, scale))
    x[0, 130] = poison
    for got in (dequantise_tiles(quantise_tiles(x, scale)), decode(encode(x), width=300)):
        assert not got[0, 128:256].isfinite().any()
        assert got[1].isfinite().all()
    got = dequantise_tiles(quantise_tiles(x, scale))
    assert torch.equal(got[1], clean[1])
    assert torch.equal(got[0, :128], clean[0, :128])


def test_the_256_numbers_are_torchs_own() -> None:
    torch.testing.assert_close(as_fp32(CODES), CODES.float(), rtol=0, atol=0, equal_nan=True)


def test_powers_of_two_lose_nothing_when_quantised_again() -> None:
    once = dequantise_tiles(quantise_tiles(random_rows(7, 300), Scale.power_of_two))
    again = dequantise_tiles(quantise_tiles(once, Scale.power_of_two))
    assert torch.equal(again, once)


def test_powers_of_two_turned_to_columns_lose_only_what_is_tiny_beside_its_column() -> None:
    once = dequantise_tiles(quantise_tiles(random_rows(200, 64), Scale.power_of_two))
    turned = dequantise_tiles(quantise_tiles(once.t(), Scale.power_of_two)).t()
    for start in range(0, 200, TILE):
        part = once[start : start + TILE]
        largest = part.abs().amax(dim=0)
        # A scale is at most 2 / 448 of the largest, and half of E4M3's smallest step is 2^-10.
        assert ((turned[start : start + TILE] - part).abs() <= largest * 2**-9 / 448).all()


def test_rows_travel_as_a_byte_a_number_and_arrive_as_they_would_be_rounded() -> None:
    rows = random_rows(5, 300).bfloat16()
    message = encode(rows)
    assert message.dtype == torch.uint8
    assert message.shape == (5, 300 + 3)
    arrived = decode(message, width=300)
    assert torch.equal(arrived, dequantise_tiles(quantise_tiles(rows, Scale.power_of_two)))
    assert torch.equal(arrived.bfloat16().float(), arrived)


def test_e5m6_keeps_six_bits_in_twelve() -> None:
    x = random_rows(4, 300)
    tiles = quantise_e5m6(x)
    assert tiles.values.dtype == torch.uint8
    assert tiles.values.shape == (4, 3 * TILE * 3 // 2)
    got = dequantise_e5m6(tiles, width=300)
    for row, got_row in zip(x, got, strict=True):
        for tile, got_tile in zip(row.split(TILE), got_row.split(TILE), strict=True):
            # Half a step: 2^-7 of the value, or of E5M6's smallest normal number 2^-14.
            step = tile.abs().clamp(min=tile.abs().max() / 2**15 * 2**-14) * 2**-7
            assert ((got_tile - tile).abs() <= step * 1.001).all()


def test_e5m6_gives_its_own_numbers_back_and_nan_as_nan() -> None:
    x = random_rows(4, 256)
    once = dequantise_e5m6(quantise_e5m6(x), width=256)
    assert torch.equal(dequantise_e5m6(quantise_e5m6(once), width=256), once)
    x[1, 3], x[2, 200] = math.nan, math.inf
    got = dequantise_e5m6(quantise_e5m6(x), width=256)
    assert got[1, 3].isnan()
    assert not got[2, 200].isfinite()
    assert torch.equal(got[0], once[0])
    assert not dequantise_e5m6(quantise_e5m6(torch.zeros(1, 5)), width=5).any()
