import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.grouped import grouped_swiglu


def _inputs(num_rows: int) -> list[Tensor]:
    shapes = [(num_rows, 5), (4, 6, 5), (4, 6, 5), (4, 5, 6)]
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 0, 8], [8, 0, 0, 0], [0, 0, 0, 0]])
def test_outputs_and_gradients_equal_a_loop_of_products(counts: list[int]) -> None:
    inputs = rows, *weights = _inputs(sum(counts))
    wanted = torch.cat(
        [
            (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
            for x, gate, up, down in zip(rows.split(counts), *weights, strict=True)
        ]
    )
    upstream = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad(wanted, inputs, upstream)

    outputs = grouped_swiglu(*inputs, counts=counts)
    torch.testing.assert_close(outputs, wanted)
    grads = torch.autograd.grad(outputs, inputs, upstream)
    torch.testing.assert_close(grads, wanted_grads)


def test_an_expert_without_rows_gets_zeros_not_none() -> None:
    rows, *weights = _inputs(4)
    grouped_swiglu(rows, *weights, counts=[4, 0, 0, 0]).sum().backward()
    for weight in weights:
        assert weight.grad is not None
        assert weight.grad[0].any()
        assert not weight.grad[1:].any()
