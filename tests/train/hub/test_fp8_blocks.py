"""FP8 in 128x128 blocks against the published formula as loops."""

import pytest
import torch

from model.fp8 import quantise_blocks as quantise
from train.hub.fp8_blocks import count_blocks, dequantise


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (5, 7), (576, 130)])
def test_each_block_is_its_values_times_its_scale(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    values, scales = quantise(matrix)
    assert values.dtype == torch.float8_e4m3fn
    assert tuple(scales.shape) == count_blocks(shape)
    whole = dequantise(values, scales)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            assert torch.equal(whole[block], values[block].float() * scales[row, column])
            # E4M3 has 3 bits after the point; what is far below the largest entry is coarser.
            largest = matrix[block].abs().max()
            bound = (matrix[block].abs() / 16).clamp(min=largest / 448 * 2**-10)
            assert ((whole[block] - matrix[block]).abs() <= bound * 1.001).all()
            assert values[block].float().abs().max() == 448


def test_a_block_of_zeros_stays_zero() -> None:
    matrix = torch.randn(256, 128)
    matrix[:128] = 0
    values, scales = quantise(matrix)
    assert torch.equal(dequantise(values, scales)[:128], matrix[:128])
    assert scales.isfinite().all()


def test_a_matrix_out_of_blocks_goes_back_into_the_same_values() -> None:
    values, scales = quantise(torch.randn(200, 300))
    again = quantise(dequantise(values, scales))
    assert torch.equal(again.values.float(), values.float())
    torch.testing.assert_close(again.scales, scales)
