import pytest
import torch
import torch.nn.functional as F

from model import loss as loss_module
from model.loss import IGNORED, summed_cross_entropy


@pytest.fixture(params=[1, 5, 1000])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * 30 * request.param)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("ignored", [[], [0, 4, 5, 12], list(range(13))])
def test_loss_and_gradients_equal_torchs_cross_entropy(ignored: list[int]) -> None:
    hidden = torch.randn(13, 8, requires_grad=True)
    head = torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (13,))
    targets[ignored] = IGNORED
    wanted = F.cross_entropy(F.linear(hidden, head), targets, reduction="sum")
    wanted_grads = torch.autograd.grad(wanted * 0.7, (hidden, head))

    loss = summed_cross_entropy(hidden, head, targets)
    torch.testing.assert_close(loss, wanted)
    grads = torch.autograd.grad(loss * 0.7, (hidden, head))
    torch.testing.assert_close(grads, wanted_grads)


@pytest.mark.usefixtures("chunk_rows")
def test_bf16_loses_no_more_than_its_own_rounding() -> None:
    exact = [torch.randn(13, 8), torch.randn(30, 8)]
    hidden, head = (tensor.bfloat16().requires_grad_() for tensor in exact)
    targets = torch.randint(30, (13,))
    logits = F.linear(hidden.float(), head.float())
    wanted = F.cross_entropy(logits, targets, reduction="sum")
    wanted_grads = torch.autograd.grad(wanted, (hidden, head))
    loss = summed_cross_entropy(hidden, head, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-2, atol=0)
    grads = torch.autograd.grad(loss, (hidden, head))
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad, wanted_grad, rtol=0.05, atol=0.05)


def test_huge_logits_neither_overflow_nor_poison() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    head = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = summed_cross_entropy(hidden, head, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2e4
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    hidden = torch.randn(3, 4, requires_grad=frozen == "head")
    head = torch.randn(5, 4, requires_grad=frozen == "hidden")
    targets = torch.tensor([1, IGNORED, 4])
    loss = summed_cross_entropy(hidden, head, targets)
    torch.testing.assert_close(
        loss, F.cross_entropy(F.linear(hidden, head), targets, reduction="sum")
    )
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    assert (hidden.grad is None) == (frozen != "head")
    assert (head.grad is None) == (frozen != "hidden")
