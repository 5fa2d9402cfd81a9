"""Which implementation is taken where, and that the table says what is done."""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from model import backends
from model.backends import (
    Backend,
    KernelsConfig,
    Wanted,
    check_kernels,
    choose_all,
    choose_experts,
    choose_fp8,
    choose_norm,
    choose_rope,
    describe,
    set_kernels,
)
from model.fp8_operations import REFERENCE, operations_on
from tests.command import compose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _forget_what_was_chosen() -> Iterator[None]:
    yield
    set_kernels(KernelsConfig())


@contextmanager
def gpu(
    capability: tuple[int, int], *, has_triton: bool = True, libraries: Iterable[str] = ()
) -> Iterator[None]:
    """As if such a GPU were here."""
    set_kernels(backends._wanted)  # forget what was chosen for another
    installed = {"triton"} if has_triton else set()
    installed |= set(libraries)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.version, "cuda", "12.9"),
        mock.patch.object(backends, "find_spec", lambda name: True if name in installed else None),
        mock.patch.object(backends, "find_c_compiler", return_value="gcc"),
    ):
        yield


def test_on_the_cpu_everything_of_ours_is_the_reference() -> None:
    assert choose_fp8(CPU).backend is Backend.reference
    assert operations_on(CPU) is REFERENCE
    assert choose_experts(CPU, torch.bfloat16).backend is Backend.reference


@pytest.mark.parametrize(
    ("capability", "has_triton", "backend", "why"),
    [
        ((8, 0), True, Backend.reference, "sm80"),
        ((8, 9), True, Backend.triton, "sm89"),
        ((9, 0), True, Backend.triton, "sm90"),
        ((9, 0), False, Backend.reference, "triton is not installed"),
    ],
)
def test_kernels_are_taken_where_the_gpu_and_triton_allow(
    capability: tuple[int, int], has_triton: bool, backend: Backend, why: str
) -> None:
    with gpu(capability, has_triton=has_triton):
        choice = choose_fp8(CUDA)
    assert choice.backend is backend
    assert why in choice.why


def test_the_table_has_a_line_for_each_and_names_libraries_that_are_not_used() -> None:
    choices = choose_all(CPU, torch.bfloat16, is_fp8=True, has_experts=True)
    operations = [one.operation for one in choices]
    ours = ["rope", "norm", "loss", "router", "rows"]
    assert operations == ["FP8", "experts", "attention", *ours, "dispatch"]
    without = choose_all(CPU, torch.bfloat16, is_fp8=False, has_experts=True)
    assert without[0].operation == "experts"
    found = importlib.util.find_spec("math")
    with mock.patch.object(
        backends, "find_spec", lambda name: found if name == "deep_ep" else None
    ):
        lines = describe(choices).splitlines()
    assert len(lines) == len(choices) + 1
    assert "deep_ep is installed, but not used" in lines[-1]


@pytest.mark.parametrize(
    ("capability", "widths", "has_triton", "backend", "why"),
    [
        ((9, 0), (2048, 1408), True, Backend.torch, "one kernel"),
        ((9, 0), (2048, 1402), True, Backend.triton, "multiples of 8"),
        ((8, 0), (2048, 1408), True, Backend.triton, "a loop here"),
        ((8, 0), (2048, 1408), False, Backend.torch, "a loop over experts here"),
        ((12, 0), (2048, 1408), True, Backend.triton, "a loop here"),
        ((7, 5), (2048, 1402), True, Backend.reference, "a loop"),
    ],
)
def test_experts_take_torchs_kernel_where_it_is_one_and_ours_elsewhere(
    capability: tuple[int, int],
    widths: tuple[int, int],
    has_triton: bool,
    backend: Backend,
    why: str,
) -> None:
    with gpu(capability, has_triton=has_triton):
        choice = choose_experts(CUDA, torch.bfloat16, widths=widths)
        assert choose_experts(CUDA, torch.float32).backend is Backend.reference
    assert choice.backend is backend
    assert why in choice.why


def test_a_user_can_do_without_any_one_kernel_or_ask_for_one() -> None:
    with gpu((8, 0)):
        assert choose_rope(CUDA).backend is Backend.reference
        assert choose_norm(CUDA).backend is Backend.reference
        experts = {"widths": (2048, 1408)}
        assert choose_experts(CUDA, torch.bfloat16, **experts).backend is Backend.triton
        set_kernels(compose("experiment=smoke", "kernels=triton").kernels)
        assert choose_rope(CUDA).backend is Backend.triton
        assert choose_rope(CUDA).why == "kernels.rope=triton"
        assert choose_norm(CUDA).backend is Backend.triton
        set_kernels(KernelsConfig(experts=Wanted.torch))
        assert choose_experts(CUDA, torch.bfloat16, **experts).backend is Backend.torch


def test_without_a_c_compiler_no_kernel_is_taken() -> None:
    with gpu((9, 0)), mock.patch.object(backends, "find_c_compiler", return_value=None):
        choice = choose_fp8(CUDA)
    assert choice.backend is Backend.reference
    assert "C compiler" in choice.why


def test_in_fp8_the_experts_choice_is_checked_too_for_layers_that_leave_it() -> None:
    set_kernels(KernelsConfig(experts=Wanted.torch))
    with pytest.raises(ValueError, match="kernels.experts=torch can't be had here"):
        choose_all(CPU, torch.bfloat16, is_fp8=True, has_experts=True)


def test_a_kernel_that_is_asked_for_in_vain_is_refused_with_the_reason() -> None:
    set_kernels(KernelsConfig(router=Wanted.triton))
    with pytest.raises(ValueError, match="kernels.router=triton can't be had here .no kernels for"):
        choose_all(CPU, torch.float32, is_fp8=False, has_experts=True)
    with pytest.raises(
        ValueError, match="kernels.rope=torch does not exist; choose auto, reference"
    ):
        check_kernels(KernelsConfig(rope=Wanted.torch))


def test_kernels_off_is_plain_pytorch_for_every_operation() -> None:
    kernels = compose("experiment=smoke", "kernels=off").kernels
    taken = {field.name: getattr(kernels, field.name) for field in fields(kernels)}
    assert taken.pop("attention") is Wanted.torch
    assert set(taken.values()) == {Wanted.reference}


def test_deep_gemm_is_taken_where_it_is_installed_and_can_run() -> None:
    library = SimpleNamespace(**dict.fromkeys(backends.DEEP_GEMM))
    with (
        gpu((9, 0), libraries=["deep_gemm"]),
        mock.patch.dict("sys.modules", {"deep_gemm": library}),
    ):
        assert choose_fp8(CUDA).backend is Backend.deep_gemm
        set_kernels(KernelsConfig(fp8=Wanted.triton))
        assert choose_fp8(CUDA).backend is Backend.triton
        set_kernels(KernelsConfig())
        del library.fp8_gemm_nt  # as in version 1
        assert choose_fp8(CUDA).backend is Backend.triton
        assert "deep_gemm lacks fp8_gemm_nt" in choose_fp8(CUDA).why
        set_kernels(KernelsConfig())
        with mock.patch.dict("sys.modules", {"deep_gemm": None}):
            assert "can't be imported" in choose_fp8(CUDA).why
    with gpu((8, 9), libraries=["deep_gemm"]):
        assert choose_fp8(CUDA).backend is Backend.triton


def test_scaled_mm_must_be_asked_for_and_needs_hopper() -> None:
    set_kernels(KernelsConfig(fp8=Wanted.torch))
    with gpu((9, 0)):
        assert choose_fp8(CUDA).backend is Backend.torch
    with gpu((8, 9)), pytest.raises(ValueError, match="choose auto or triton or reference"):
        choose_fp8(CUDA)


def test_another_flash_attention_that_is_not_installed_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels.attention=fa4 needs flash_attn.cute.interface"):
        set_kernels(KernelsConfig(attention=Wanted.fa4))


def test_the_page_shows_the_table_that_is_printed() -> None:
    with mock.patch.object(backends, "find_spec", return_value=None):
        table = describe(choose_all(CPU, torch.bfloat16, is_fp8=True, has_experts=True))
    page = Path(__file__).parents[2] / "docs" / "precision.md"
    assert f"operations:\n{table}\n" in page.read_text()
