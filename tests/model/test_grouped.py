import pytest
import torch

from model.grouped import grouped_product


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 0, 8], [8, 0, 0, 0], [0, 0, 0, 0]])
def test_product_and_gradients_equal_a_loop_of_products(counts: list[int]) -> None:
    rows = torch.randn(sum(counts), 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    wanted = torch.cat([r @ w.t() for r, w in zip(rows.split(counts), weights, strict=True)])
    upstream = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad(wanted, (rows, weights), upstream)
    product = grouped_product(rows, weights, counts)
    torch.testing.assert_close(product, wanted)
    grads = torch.autograd.grad(product, (rows, weights), upstream)
    torch.testing.assert_close(grads, wanted_grads)


def test_an_expert_without_rows_gets_zeros_not_none() -> None:
    rows = torch.randn(4, 5, requires_grad=True)
    weights = torch.randn(3, 6, 5, requires_grad=True)
    grouped_product(rows, weights, [4, 0, 0]).sum().backward()
    assert weights.grad is not None
    assert weights.grad[0].any()
    assert torch.equal(weights.grad[1:], torch.zeros(2, 6, 5))
