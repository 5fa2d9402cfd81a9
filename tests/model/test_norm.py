import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.norm import RMSNorm


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 4, 8)])
def test_values_and_gradients_equal_torchs(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(8, eps=1e-2)
    nn.init.normal_(norm.weight)
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(shape)
    inputs = (x, norm.weight)
    wanted = F.rms_norm(x, (8,), norm.weight, 1e-2)
    wanted_grads = torch.autograd.grad(wanted, inputs, upstream)
    torch.testing.assert_close(norm(x), wanted)
    torch.testing.assert_close(torch.autograd.grad(norm(x), inputs, upstream), wanted_grads)


def test_a_slice_of_a_wider_tensor_is_normed_alike() -> None:
    norm = RMSNorm(4, eps=1e-6)
    nn.init.ones_(norm.weight)
    wide = torch.randn(3, 9, requires_grad=True)
    norm(wide[:, 2:6]).sum().backward()
    alone = wide.detach()[:, 2:6].clone().requires_grad_()
    norm(alone).sum().backward()
    assert wide.grad is not None
    torch.testing.assert_close(wide.grad[:, 2:6], alone.grad)


def test_zeros_stay_zero_with_finite_gradients() -> None:
    norm = RMSNorm(4, eps=1e-6)
    nn.init.ones_(norm.weight)
    x = torch.zeros(2, 4, requires_grad=True)
    norm(x).sum().backward()
    assert not norm(x).any()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_bf16_is_normed_in_fp32() -> None:
    norm = RMSNorm(64, eps=1e-6)
    nn.init.ones_(norm.weight)
    x = torch.randn(3, 64).bfloat16()
    wanted = F.rms_norm(x.float(), (64,), norm.weight, 1e-6).bfloat16()
    assert torch.equal(norm.bfloat16()(x), wanted)
