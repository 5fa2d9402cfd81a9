"""FP8 products by DeepGEMM, on Hopper: one matrix, or experts' rows with theirs.

M rows sorted by expert, P the same padded, E experts, K the summed width, N columns. What it asks
for (DeepGEMM 2, csrc/apis/gemm.hpp and its tests): operands with K running fastest, fp32 scales of
tiles [M, K/128] and blocks [E, N/128, K/128], results in BF16, each expert's run padded to a
multiple of its block of rows, the expert of each row or -1. It lays the scales out itself. Weights'
gradients stay with the kernels here.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.fp8 import Quantised
from model.fp8_operations import Operations
from model.kernels.library_products import take_products


class Padded(NamedTuple):
    """Runs of rows, each padded to a multiple of the library's block."""

    experts: Tensor  # [P], int32: the expert of each row, -1 for one that pads
    places: Tensor  # [M]: where each row lies


def take_deep_gemm(others: Operations, library: Any) -> Operations:
    """`others`, but for products in BF16 of widths that are multiples of 128, which `library`, the
    module `deep_gemm`, takes."""
    return take_products(others, partial(_product, library), most_experts=None)


def _product(library: Any, tiles: Quantised, blocks: Quantised, counts: Sequence[int]) -> Tensor:
    rows, scales = (part.contiguous() for part in tiles)
    num_columns = blocks.values.shape[1]
    if len(counts) == 1:
        outputs = torch.empty(len(rows), num_columns, dtype=torch.bfloat16, device=rows.device)
        library.fp8_gemm_nt((rows, scales), (blocks.values[0], blocks.scales[0]), outputs)
        return outputs
    runs = pad_runs(tuple(counts), rows.device, block=_block_of_rows(library))
    size = len(runs.experts)
    outputs = torch.empty(size, num_columns, dtype=torch.bfloat16, device=rows.device)
    padded_rows = _spread(rows.view(torch.uint8), runs.places, size).view(rows.dtype)
    padded_scales = _spread(scales, runs.places, size)
    library.m_grouped_fp8_gemm_nt_contiguous(
        (padded_rows, padded_scales), tuple(blocks), outputs, runs.experts
    )
    return outputs.index_select(0, runs.places)


@lru_cache(maxsize=4)  # a layer's products, one after another, ask for the same
def pad_runs(counts: tuple[int, ...], device: torch.device, *, block: int) -> Padded:
    """Runs of so many rows each, padded to multiples of `block`."""
    of_experts = torch.tensor(counts)
    padded = (of_experts + block - 1) // block * block
    starts, padded_starts = (sizes.cumsum(0) - sizes for sizes in (of_experts, padded))
    shift = (padded_starts - starts).repeat_interleave(of_experts)
    places = torch.arange(sum(counts)) + shift
    experts = torch.full((int(padded.sum()),), -1, dtype=torch.int32)
    ids = torch.arange(len(counts), dtype=torch.int32)
    experts[places] = ids.repeat_interleave(of_experts)
    return Padded(*(part.to(device, non_blocking=True) for part in (experts, places)))


def _spread(rows: Tensor, places: Tensor, size: int) -> Tensor:
    return rows.new_zeros(size, rows.shape[1]).index_copy_(0, places, rows)


def _block_of_rows(library: Any) -> int:
    """Its multiple for runs, by the name that its version has for it."""
    for name in ("get_mk_alignment_for_contiguous_layout", "get_m_alignment_for_contiguous_layout"):
        if hasattr(library, name):
            return int(getattr(library, name)())
    raise RuntimeError("this version of DeepGEMM does not say how it wants runs padded")
