"""Which implementation each operation takes on a device, and why: one table, shown at the start.

`kernels` in the config overrules it: `kernels=off` is plain PyTorch everywhere.
"""

import os
import shutil
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

from model import flash_attention

FP8_CAPABILITY = (8, 9)  # Ada and Hopper: the first with products of E4M3
KERNEL_CAPABILITY = (8, 0)  # Ampere: the first with products of BF16
UNMEASURED = "not measured yet: python -m bench.kernels"
DEEP_GEMM = ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous")  # version 2's names
UNUSED = {  # libraries that do such work elsewhere: of which operation, and why not here
    "flash_attn": ("attention", "torch's varlen_attn is the same FlashAttention 2"),
    "deep_ep": ("dispatch", "it needs NVLink or RDMA and buffers of its own; nobody has tried it"),
}


class Backend(StrEnum):
    reference = "reference"  # plain PyTorch, which the others must equal
    torch = "torch"
    triton = "triton"
    deep_gemm = "deep_gemm"
    fa3 = "fa3"  # FlashAttention 3, through torch's dispatcher
    fa4 = "fa4"


class Wanted(StrEnum):
    """What the config says of an operation: the best that is there, or a certain one."""

    auto = "auto"
    reference = "reference"
    torch = "torch"
    triton = "triton"
    deep_gemm = "deep_gemm"
    fa3 = "fa3"
    fa4 = "fa4"


@dataclass(slots=True, kw_only=True)
class KernelsConfig:
    #: Quantisation and products of FP8: auto, reference, triton, torch (its blockwise scaled_mm for
    #: products with one matrix, triton for the rest) or deep_gemm (all but weights' gradients).
    fp8: Wanted = Wanted.auto
    #: The experts' products without FP8: auto, reference, torch or triton.
    experts: Wanted = Wanted.auto
    #: Attention: auto or torch; or fa3, fa4: FlashAttention 3 or 4, where torch uses its own.
    attention: Wanted = Wanted.auto
    #: RMSNorm: auto, reference (torch's, fused on GPUs) or triton.
    norm: Wanted = Wanted.auto
    #: RoPE on MLA's split heads: auto, reference or triton.
    rope: Wanted = Wanted.auto
    #: The router's choice of experts: auto, reference or triton.
    router: Wanted = Wanted.auto
    #: Copies of tokens for their experts, and the weighted sum of results: auto, reference or
    #: triton.
    rows: Wanted = Wanted.auto


KNOWN = {  # what there is for an operation, where that isn't reference and triton
    "fp8": ("reference", "triton", "torch", "deep_gemm"),
    "experts": ("reference", "torch", "triton"),
    "attention": ("torch", "fa3", "fa4"),
}


class Choice(NamedTuple):
    operation: str
    backend: Backend
    why: str


_wanted = KernelsConfig()


def set_kernels(config: KernelsConfig) -> None:
    """Let the config overrule what operations take from now on, in the whole process.

    Autograd's own threads ask too, so that it can't be a context's.

    Raises:
        ValueError: `model.flash_attention.activate`.
    """
    global _wanted
    is_other = config.attention in (Wanted.fa3, Wanted.fa4)
    flash_attention.activate(config.attention.value if is_other else None)
    _wanted = config
    for choose in (
        choose_fp8,
        choose_experts,
        choose_attention,
        choose_norm,
        choose_rope,
        choose_router,
        choose_rows,
    ):
        choose.cache_clear()


def check_kernels(config: KernelsConfig) -> None:
    """Refuse, with a ValueError, an implementation that exists on no device."""
    for field in fields(config):
        wanted, known = getattr(config, field.name), KNOWN.get(field.name, ("reference", "triton"))
        if wanted is not Wanted.auto and wanted not in known:
            raise ValueError(
                f"kernels.{field.name}={wanted} does not exist; choose auto, {', '.join(known)}"
            )


def choose_all(
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_fp8: bool,
    has_experts: bool,
    has_split_heads: bool = True,
    widths: tuple[int, ...] = (),
) -> list[Choice]:
    """Every operation that has more than one implementation, or might have.

    `has_split_heads`: only a part of each is turned by RoPE, as MLA's. `widths`: `choose_experts`.

    Raises:
        ValueError: The config names an implementation that this device can't have.
    """
    choices = [choose_fp8(device)] if is_fp8 else []
    if has_experts:
        experts = choose_experts(device, dtype, widths=widths)
        why = f"where a layer leaves FP8: {experts.why}" if is_fp8 else experts.why
        choices.append(experts._replace(why=why))
    choices += [
        choose_attention(device, dtype),
        *([choose_rope(device)] if has_split_heads else []),
        choose_norm(device),
        Choice("loss", Backend.reference, "in slices; linear_cross_entropy: python -m bench.loss"),
    ]
    if has_experts:
        choices += [
            choose_router(device),
            choose_rows(device),
            Choice("dispatch", Backend.torch, "all_to_all_single, uneven splits"),
        ]
    return choices


@cache
def choose_fp8(device: torch.device) -> Choice:
    """Quantisation and products of FP8. DeepGEMM is taken if someone took the trouble to install
    it; torch's scaled_mm must be asked for, since which is quicker isn't measured."""
    operation = "FP8"
    missing = _missing(device)
    if missing is None and _capability(device) < FP8_CAPABILITY:
        missing = f"{_name(device)} has no FP8 products, sm89 has"
    if missing is not None:
        return _pick(Choice(operation, Backend.reference, missing))
    ranked = [
        Choice(operation, Backend.triton, f"{_name(device)}: model/kernels"),
        Choice(operation, Backend.reference, "plain PyTorch"),
    ]
    if _capability(device)[0] == 9:
        if find_spec("deep_gemm") is not None:
            fault = _fault_of_deep_gemm()
            if fault is None:
                why = "installed: products in BF16 of widths of 128s; else ours; unmeasured"
                ranked.insert(0, Choice(operation, Backend.deep_gemm, why))
            else:
                ranked[0] = ranked[0]._replace(why=f"{ranked[0].why}; {fault}")
        if _cuda_version() >= (12, 9):
            ranked.append(Choice(operation, Backend.torch, "scaled_mm"))
    return _pick(*ranked)


@cache
def choose_attention(device: torch.device, dtype: torch.dtype) -> Choice:
    """Attention: torch's choice among its kernels, or another flash attention in its place."""
    is_short = device.type == "cuda" and dtype.itemsize == 2
    inside = "varlen_attn" if is_short else "once for each of their lengths"
    why = f"scaled_dot_product_attention; in documents {inside}"
    ranked = [Choice("attention", Backend.torch, why)]
    if is_short:
        major = _capability(device)[0]
        ranked += [Choice("attention", Backend.fa3, "")] if major == 9 else []
        ranked += [Choice("attention", Backend.fa4, "")] if major in (9, 10) else []
    return _pick(*ranked)


@cache
def choose_experts(
    device: torch.device, dtype: torch.dtype, *, widths: tuple[int, ...] = ()
) -> Choice:
    """The experts' products without FP8; `widths` are the model's and the experts' inner one.

    torch's `grouped_mm` is one kernel on Hopper and on data-centre Blackwell only; elsewhere it
    loops over experts and waits for their counts (pytorch 2.11, aten/src/ATen/native/cuda/
    GroupedBlas.cpp: `_grouped_mm_cuda`). It wants strides of 16 bytes everywhere.
    """
    operation = "experts"
    plain = "a loop keeps an expert's rows in the cache"
    if device.type != "cuda":
        return _pick(Choice(operation, Backend.reference, plain))
    if dtype != torch.bfloat16:
        why = f"grouped products are of BF16 only, not {dtype}"
        return _pick(Choice(operation, Backend.reference, why))
    ranked = []
    is_aligned = all(width % 8 == 0 for width in widths)
    is_one_kernel = torch.version.hip is None and _capability(device)[0] in (9, 10)
    if is_aligned:
        about = "one kernel for all experts" if is_one_kernel else "a loop over experts here"
        ranked.append(Choice(operation, Backend.torch, f"{_name(device)}: grouped_mm, {about}"))
    if _missing(device) is None:
        reason = f"grouped_mm is a loop here; {UNMEASURED}"
        if not is_aligned:
            reason = f"grouped_mm wants multiples of 8, not {widths}"
        kernel = Choice(operation, Backend.triton, f"{_name(device)}: {reason}")
        ranked.insert(len(ranked) if is_one_kernel else 0, kernel)
    return _pick(*ranked, Choice(operation, Backend.reference, "a loop over experts"))


@cache
def choose_norm(device: torch.device) -> Choice:
    """RMSNorm. torch's is fused both ways on CUDA, so ours must be asked for."""
    missing = _missing(device)
    why = "torch's rms_norm is fused; python -m bench.kernels"
    if device.type != "cuda":
        why = f"few passes over memory; {missing}"
    kernels = [Choice("norm", Backend.triton, "")] if missing is None else []
    return _pick(Choice("norm", Backend.reference, why), *kernels)


@cache
def choose_rope(device: torch.device) -> Choice:
    """RoPE on MLA's split heads."""
    return _kernel_if_any("rope", device)


@cache
def choose_router(device: torch.device) -> Choice:
    """The choice of experts and their weights."""
    return _kernel_if_any("router", device)


@cache
def choose_rows(device: torch.device) -> Choice:
    """Copies of tokens for their experts, and the weighted sum of results."""
    return _kernel_if_any("rows", device)


def describe(choices: list[Choice]) -> str:
    """A line for each; and for libraries that are there, but not used."""
    lines = [f"  {one.operation:10} {one.backend:10} {one.why}" for one in choices]
    lines += [
        f"  {operation:10} {'':10} {library} is installed, but not used here: {why}"
        for library, (operation, why) in UNUSED.items()
        if find_spec(library) is not None
    ]
    return "\n".join(lines)


def _kernel_if_any(operation: str, device: torch.device) -> Choice:
    """Kernels that no GPU has run yet must be asked for: `kernels=triton`."""
    missing = _missing(device)
    if missing is not None:
        return _pick(Choice(operation, Backend.reference, missing))
    return _pick(
        Choice(operation, Backend.reference, f"kernels.{operation}=triton is {UNMEASURED}"),
        Choice(operation, Backend.triton, ""),
    )


def _pick(*ranked: Choice) -> Choice:
    """The one that the config names; the first, if it leaves that open."""
    best = ranked[0]
    key = best.operation.lower()
    wanted = getattr(_wanted, key)
    if wanted is Wanted.auto:
        return best
    for choice in ranked:
        if choice.backend == wanted:
            return choice._replace(why=f"kernels.{key}={wanted}")
    raise ValueError(
        f"kernels.{key}={wanted} can't be had here ({best.why}); choose auto or "
        + " or ".join(choice.backend for choice in ranked)
    )


def _missing(device: torch.device) -> str | None:
    """Why Triton kernels can't run there; None if they can."""
    if device.type != "cuda":
        return f"no kernels for {device.type}"
    if torch.version.hip is not None:
        return "kernels are for CUDA: AMD's E4M3 is another, and nothing was tested there"
    if _capability(device) < KERNEL_CAPABILITY:
        return f"{_name(device)}: kernels are for sm80 and newer"
    if find_spec("triton") is None:
        return "triton is not installed"
    if find_c_compiler() is None:
        return "triton needs a C compiler (CC, gcc or clang), and there is none"
    return None


def find_c_compiler() -> str | None:
    """What Triton builds a kernel's launcher with, at its first use."""
    names = [os.environ.get("CC"), "gcc", "clang"]
    return next((name for name in names if name and shutil.which(name)), None)


def _fault_of_deep_gemm() -> str | None:
    """Why an installed DeepGEMM can't be used; None if it can."""
    try:
        library = import_module("deep_gemm")
    except Exception as error:  # built for another torch, say
        return f"deep_gemm can't be imported ({error})"
    lacking = [name for name in DEEP_GEMM if not hasattr(library, name)]
    return f"deep_gemm lacks {', '.join(lacking)}: version 2 has it" if lacking else None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _cuda_version() -> tuple[int, ...]:
    return tuple(int(part) for part in (torch.version.cuda or "0.0").split("."))


def _name(device: torch.device) -> str:
    major, minor = _capability(device)
    return f"sm{major}{minor}"
