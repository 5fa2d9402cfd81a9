"""Where tests run Triton's kernels: in its interpreter, or on a GPU where there is one."""

import importlib
from types import ModuleType

import numpy
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="pip install 'thrifty[kernels]'")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


# Its interpreter once made numbers of arrays with one element, which NumPy 2.4 refuses.
IS_NUMPY_STRICT = _version(numpy.__version__) >= (2, 4)
IS_INTERPRETER_BROKEN = IS_NUMPY_STRICT and _version(triton.__version__) < (3, 9)
CPU = pytest.param(
    "cpu",
    marks=[
        pytest.mark.skipif(torch.cuda.is_available(), reason="compiled"),
        pytest.mark.skipif(
            IS_INTERPRETER_BROKEN, reason="the interpreter of Triton before 3.9 under NumPy 2.4"
        ),
    ],
)
DEVICES = [CPU, pytest.param("cuda", marks=pytest.mark.gpu)]
ON_DEVICES = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, at NaN
]


def kernel(name: str) -> ModuleType:
    """Imported when it is asked for: the interpreter is chosen before."""
    return importlib.import_module(f"model.kernels.{name}")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
