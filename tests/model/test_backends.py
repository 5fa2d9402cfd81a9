"""Which implementation is taken where, and that the table says what is done."""

import importlib.util
from unittest import mock

import pytest
import torch

from model import backends
from model.backends import Backend, choose_all, choose_experts, choose_fp8, describe
from model.fp8_operations import REFERENCE, operations_on

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
    choose_fp8.cache_clear()
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(backends, "find_spec", return_value=has_triton or None),
    ):
        choice = choose_fp8(CUDA)
    choose_fp8.cache_clear()
    assert choice.backend is backend
    assert why in choice.why


def test_the_table_has_a_line_for_each_and_names_libraries_that_are_not_used() -> None:
    choices = choose_all(CPU, torch.bfloat16, is_fp8=True, has_experts=True)
    assert [one.operation for one in choices] == ["FP8", "attention", "loss", "dispatch"]
    without = choose_all(CPU, torch.bfloat16, is_fp8=False, has_experts=True)
    assert without[0].operation == "experts"
    found = importlib.util.find_spec("math")
    with mock.patch.object(
        backends, "find_spec", lambda name: found if name == "deep_ep" else None
    ):
        lines = describe(choices).splitlines()
    assert len(lines) == len(choices) + 1
    assert "deep_ep is installed, but not used" in lines[-1]
