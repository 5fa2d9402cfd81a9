"""Products of FP8 by torch's scaled_mm and DeepGEMM, attention by FlashAttention: as without.

On a GPU with the libraries themselves. Elsewhere: torch's own check of shapes and strides on
tensors without data, and a stand-in for DeepGEMM that refuses what the library would refuse.
"""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model import flash_attention, fp8
from model.attention import attend
from model.backends import KernelsConfig, Wanted, choose_fp8, set_kernels
from model.fp8 import Quantised
from model.fp8_operations import REFERENCE, library_operations
from model.kernels.deep_gemm import pad_runs, take_deep_gemm
from model.kernels.scaled_mm import scaled_product, take_scaled_mm

COUNTS = [[3, 0, 140, 1], [0, 0, 0, 7], [130, 0, 0, 0], [128, 128, 0, 0], [17], [1]]
SIDES = ["grouped_multiply", "grouped_multiply_transposed"]


def operands(counts: list[int], side: str, *, columns: int = 256, width: int = 384) -> Any:
    inner = width if side == "grouped_multiply" else columns
    tiles = fp8.quantise_tiles(torch.randn(sum(counts), inner))
    return tiles, fp8.quantise_blocks(torch.randn(len(counts), columns, width))


def block_of_128() -> int:
    return 128


def fp8_gemm_nt(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, **others: Any
) -> None:
    """`d = a b^T`, for one matrix."""
    assert all(part.is_contiguous() for part in (*a, *b, d))
    assert d.dtype == torch.bfloat16
    (rows, depth), (columns, same) = a[0].shape, b[0].shape
    assert depth == same
    assert a[1].shape == (rows, -(-depth // 128))
    assert b[1].shape == (-(-columns // 128), -(-depth // 128))
    x, w = fp8.dequantise_tiles(Quantised(*a)), fp8.dequantise_blocks(Quantised(*b))
    d.copy_(x @ w.t())


def m_grouped_fp8_gemm_nt_contiguous(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, experts: Tensor
) -> None:
    """The same for runs of rows; a block of 128 rows has the matrix of its first one."""
    assert experts.dtype == torch.int32
    assert len(experts) == len(a[0]) == len(d)
    assert len(experts) % 128 == 0
    for first in range(0, len(d), 128):
        own, expert = slice(first, first + 128), int(experts[first])
        assert set(experts[own].tolist()) <= {expert, -1}
        parts = (part[own] for part in a), (part[expert] for part in b)
        fp8_gemm_nt(*(tuple(side) for side in parts), d[own])


STAND_IN: Any = SimpleNamespace(
    fp8_gemm_nt=fp8_gemm_nt,
    m_grouped_fp8_gemm_nt_contiguous=m_grouped_fp8_gemm_nt_contiguous,
    get_mk_alignment_for_contiguous_layout=block_of_128,
)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("counts", COUNTS)
def test_runs_reach_deep_gemm_padded_as_it_wants_and_come_back(
    counts: list[int], side: str
) -> None:
    tiles, blocks = operands(counts, side)
    how = {"counts": counts, "dtype": torch.bfloat16}
    got = getattr(take_deep_gemm(REFERENCE, STAND_IN), side)(tiles, blocks, **how)
    torch.testing.assert_close(got, getattr(REFERENCE, side)(tiles, blocks, **how))


def test_padding_names_each_rows_expert_and_no_other() -> None:
    runs = pad_runs((3, 0, 5), torch.device("cpu"), block=4)
    assert runs.experts.tolist() == [0, 0, 0, -1, 2, 2, 2, 2, 2, -1, -1, -1]
    assert runs.places.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("counts", "columns", "dtype"),
    [([5], 200, torch.bfloat16), ([0], 256, torch.bfloat16), ([5], 256, torch.float32)],
)
def test_what_libraries_cannot_take_stays_with_the_kernels(
    counts: list[int], columns: int, dtype: torch.dtype, side: str
) -> None:
    tiles, blocks = operands(counts, side, columns=columns)
    how = {"counts": counts, "dtype": dtype}
    refusing: Any = SimpleNamespace()  # has no function at all
    for operations in (take_deep_gemm(REFERENCE, refusing), take_scaled_mm(REFERENCE)):
        got = getattr(operations, side)(tiles, blocks, **how)
        assert torch.equal(got, getattr(REFERENCE, side)(tiles, blocks, **how))


@pytest.mark.parametrize("rows", [1, 17, 256])
@pytest.mark.parametrize(("columns", "depth"), [(128, 128), (384, 1408), (512, 512)])
def test_torch_accepts_the_layout_of_scales(rows: int, columns: int, depth: int) -> None:
    """Its shape function for CUDA, which looks at strides too."""
    with FakeTensorMode():
        there: Any = {"device": "cuda"}
        tiles = Quantised(
            torch.empty(rows, depth, dtype=fp8.E4M3, **there),
            torch.empty(rows, depth // 128, **there),
        )
        blocks = Quantised(
            torch.empty(columns, depth, dtype=fp8.E4M3, **there),
            torch.empty(columns // 128, depth // 128, **there),
        )
        product = scaled_product(tiles, blocks)
    assert product.shape == (rows, columns)
    assert product.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("library", [Wanted.torch, Wanted.deep_gemm])
def test_products_by_libraries_are_the_references(
    library: Wanted, counts: list[int], side: str
) -> None:
    if library is Wanted.deep_gemm and find_spec("deep_gemm") is None:
        pytest.skip("deep_gemm is not installed")
    set_kernels(KernelsConfig(fp8=library))
    try:
        backend = choose_fp8(torch.device("cuda")).backend
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        set_kernels(KernelsConfig())
    tiles, blocks = operands(counts, side)
    how = {"counts": counts, "dtype": torch.bfloat16}
    there = (Quantised(*(part.cuda() for part in pair)) for pair in (tiles, blocks))
    got = getattr(library_operations(backend), side)(*there, **how).cpu()
    how["dtype"] = torch.float32
    positive = (
        Quantised(one.values.float().abs().to(fp8.E4M3), one.scales) for one in (tiles, blocks)
    )
    of_magnitudes = getattr(REFERENCE, side)(*positive, **how)
    wanted = getattr(REFERENCE, side)(tiles, blocks, **how)
    # Tensor cores' sums of 14 bits, and BF16's rounding of the result.
    bound = of_magnitudes * 2**-11 + wanted.abs() * 2**-8
    assert ((got.float() - wanted).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [((4, 192), (4, 192), (4, 128)), ((8, 128), (2, 128), (2, 128))])
@pytest.mark.parametrize("version", [Wanted.fa3, Wanted.fa4])
def test_another_flash_attention_equals_torchs_inside_documents(
    version: Wanted, heads: tuple[tuple[int, int], ...]
) -> None:
    if not flash_attention.is_installed(version):
        pytest.skip(f"{flash_attention.MODULES[version]} is not installed")
    if torch.cuda.get_device_capability()[0] not in ((9,) if version is Wanted.fa3 else (9, 10)):
        pytest.skip(f"{version} is not for this GPU")
    inputs = [
        torch.randn(1, 2048, *size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for size in heads
    ]
    upstream = torch.randn(1, 2048, *(heads[0][0], heads[2][1]), device="cuda").bfloat16()

    def results() -> list[Tensor]:
        mixed = attend(*inputs, scale=0.1, segments=[700, 24, 300, 1, 999, 24])
        return [mixed, *torch.autograd.grad(mixed, inputs, upstream)]

    wanted = results()
    set_kernels(KernelsConfig(attention=version))
    try:
        got = results()
    finally:
        set_kernels(KernelsConfig())
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).float().norm() <= 1e-2 * other.float().norm()
