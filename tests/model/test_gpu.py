"""The model on a CUDA device equals the model on the CPU (`make gpu-check`)."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model import fp8_swiglu, offload
from model.attention import attend
from model.backends import Backend, choose_fp8
from model.cache import Cache
from model.fp8_operations import REFERENCE
from model.fp8_swiglu import grouped_swiglu_in_fp8
from model.grouped import grouped_swiglu
from model.init import initialise
from model.loss import IGNORED, summed_cross_entropy
from model.memory import routed_peak
from model.moe import MoE, MoEConfig
from model.recompute import Recompute
from model.router import RouterConfig
from model.segments import has_varlen_kernel
from tests.model.small import packed_batch, small_config, small_model

pytestmark = pytest.mark.gpu

SEGMENTS = [[9, 3], [12]]


@pytest.fixture(autouse=True)
def _exact_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    got = got.float().cpu()
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("in_halves", [False, True])
def test_losses_and_gradients_equal_the_cpus(in_halves: bool) -> None:
    batch = packed_batch(SEGMENTS)
    lengths = [length for row in SEGMENTS for length in row]
    here = small_model(small_config(mtp_depth=1))
    there = small_model(small_config(mtp_depth=1), in_halves=in_halves).cuda()
    sums = here(*batch, segments=lengths)
    sums_there = there(*(tensor.cuda() for tensor in batch), segments=lengths)
    assert torch.equal(sums.load, sums_there.load.cpu())
    for ours, theirs in zip(sums[:3], sums_there[:3], strict=True):
        assert_near(theirs, ours, 1e-5)
    (sums.loss + sums.mtp_loss.sum()).backward()
    (sums_there.loss + sums_there.mtp_loss.sum()).backward()
    for name, parameter in here.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-6:
            grad = there.get_parameter(name).grad
            assert grad is not None, name
            assert_near(grad, parameter.grad, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [((4, 24), (4, 24), (4, 16)), ((4, 16), (2, 16), (2, 16))])
def test_attention_inside_documents_equals_the_cpus_and_has_no_mask(
    shapes: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    segments = [700, 24, 300, 1, 999, 24]
    here = [torch.randn(2, 1024, *shape).to(dtype).requires_grad_() for shape in shapes]
    there = [tensor.detach().cuda().requires_grad_() for tensor in here]
    expected = attend(*(tensor.float() for tensor in here), scale=0.2, segments=segments)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = attend(*there, scale=0.2, segments=segments)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    got.backward(upstream.cuda().to(dtype))
    assert torch.cuda.max_memory_allocated() - before < 1024 * 1024 * 4 * 4  # one mask of 4 heads
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert_near(got, expected, tolerance)
    for ours, theirs in zip(here, there, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_near(theirs.grad, ours.grad.float(), tolerance)


def test_one_kernel_takes_documents_of_any_length_in_16_bits_from_ampere_on() -> None:
    if torch.cuda.get_device_capability() >= (8, 0):
        assert has_varlen_kernel(torch.empty(1, 1, 192, dtype=torch.bfloat16, device="cuda"))
    assert not has_varlen_kernel(torch.empty(1, 1, 192, device="cuda"))


def kept_and_gradients(dtype: torch.dtype, **settings: Any) -> tuple[int, list[torch.Tensor]]:
    """Bytes that are allocated for the backward pass of a model, and its gradients."""
    config = small_config(mtp_depth=1)
    config.dim = 128
    assert config.moe is not None
    config.moe.expert_dim = 64
    model = small_model(config, **settings).to("cuda", dtype)
    batch = packed_batch([[96, 160]] * 4)
    before = torch.cuda.memory_allocated()
    sums = model(*(tensor.cuda() for tensor in batch), segments=[96, 160] * 4)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    (sums.loss + sums.mtp_loss.sum()).backward()
    return kept, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_and_offload_keep_less_and_change_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", {"cuda": 0})
    kept, wanted = kept_and_gradients(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2  # attention's backward adds in any order
    last = kept
    for mode in (Recompute.selective, Recompute.full):
        kept_now, grads = kept_and_gradients(dtype, recompute=mode)
        assert kept_now < last
        last = kept_now
        for grad, expected in zip(grads, wanted, strict=True):
            assert_near(grad, expected.float().cpu(), tolerance)
    for mode in Recompute:
        kept_now, grads = kept_and_gradients(dtype, recompute=mode, offloads=True)
        assert kept_now < kept
        for grad, expected in zip(grads, wanted, strict=True):
            assert_near(grad, expected.float().cpu(), tolerance)


def test_experts_rows_in_chunks_keep_to_the_bound_in_bf16() -> None:
    config = MoEConfig(
        num_experts=8,
        top_k=2,
        expert_dim=256,
        num_shared_experts=0,
        max_tokens_per_chunk=1024,
        router=RouterConfig(),
    )
    moe = MoE(config, dim=512)
    initialise(moe, seed=3, std=0.1)
    moe.to("cuda", torch.bfloat16)
    x = torch.randn(1, 4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    counted = torch.ones(1, 4096, dtype=torch.bool, device="cuda")
    moe(x, counted).hidden.sum().backward()  # libraries take their workspaces
    moe.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    moe(x, counted).hidden.sum().backward()
    bound = 2 * routed_peak(config, dim=512, tokens=4096, num_local=8, is_fused=True)
    assert torch.cuda.max_memory_allocated() - before <= bound


@pytest.mark.parametrize("limit", [None, 1024])
def test_the_host_waits_once_for_its_device_in_a_layer(limit: int | None) -> None:
    config = MoEConfig(
        num_experts=8,
        top_k=2,
        expert_dim=256,
        max_tokens_per_chunk=limit,
        router=RouterConfig(),
    )
    moe = MoE(config, dim=512)
    initialise(moe, seed=3, std=0.1)
    moe.to("cuda", torch.bfloat16)
    warm, x = torch.randn(
        2, 1, 1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True
    ).unbind()  # other tokens, other counts: nothing that follows from them is kept from before
    counted = torch.ones(1, 1024, dtype=torch.bool, device="cuda")
    moe(warm, counted).hidden.sum().backward()  # what is loaded or tuned at the first use
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            moe(x, counted).hidden.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert ["synchroniz" in str(one.message) for one in waits] == [True]


@pytest.mark.parametrize("counts", [[5, 0, 11, 1], [0, 0, 0, 17], [4, 4, 4, 5]])
def test_grouped_experts_in_bf16_equal_the_cpus_also_without_rows(counts: list[int]) -> None:
    shapes = [(17, 64), (4, 32, 64), (4, 32, 64), (4, 64, 32)]
    here = [torch.randn(shape).mul(0.3).bfloat16().requires_grad_() for shape in shapes]
    there = [tensor.detach().cuda().requires_grad_() for tensor in here]
    expected = grouped_swiglu(*here, counts=counts)
    got = grouped_swiglu(*there, counts=counts)
    assert_near(got, expected.float(), 2e-2)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    got.backward(upstream.cuda())
    for ours, theirs in zip(here, there, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_near(theirs.grad, ours.grad.float(), 2e-2)


@pytest.mark.parametrize("counts", [[1024] * 4, [4001, 0, 1, 94]])
def test_experts_in_fp8_equal_their_reference_at_v2_lites_widths(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if choose_fp8(torch.device("cuda")).backend is Backend.reference:
        pytest.skip("no FP8 kernels here")
    shapes = [(4096, 2048), (4, 1408, 2048), (4, 1408, 2048), (4, 2048, 1408)]
    inputs = [torch.randn(one, device="cuda").div(one[-1] ** 0.5).bfloat16() for one in shapes]
    inputs[0] *= 2048**0.5
    inputs = [one.requires_grad_() for one in inputs]
    upstream = torch.randn_like(inputs[0])

    def results() -> list[torch.Tensor]:
        outputs = grouped_swiglu_in_fp8(*inputs, counts=counts)
        return [outputs, *torch.autograd.grad(outputs, inputs, upstream)]

    got = results()
    monkeypatch.setattr(fp8_swiglu, "operations_on", lambda _: REFERENCE)
    for one, expected in zip(got, results(), strict=True):
        assert (one - expected).float().norm() <= 1e-2 * expected.float().norm()


def test_the_loss_in_slices_equals_cross_entropy() -> None:
    hidden = torch.randn(300, 64, device="cuda", requires_grad=True)
    head = torch.randn(1000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(1000, (300,), device="cuda")
    targets[::7] = IGNORED
    grads = torch.autograd.grad(summed_cross_entropy(hidden, head, targets), (hidden, head))
    plain = F.cross_entropy(hidden @ head.t(), targets, reduction="sum", ignore_index=IGNORED)
    for got, expected in zip(grads, torch.autograd.grad(plain, (hidden, head)), strict=True):
        assert_near(got, expected.cpu(), 1e-4)


@torch.no_grad()
def test_decoding_equals_the_full_forward() -> None:
    config = small_config()
    model = small_model(config).cuda()
    tokens = torch.randint(config.vocab_size, (2, 12), device="cuda")
    caches = [Cache(capacity=12) for _ in model.layers]
    states = [model.decode(new, caches) for new in tokens.split([7, 1, 4], dim=1)]
    assert_near(model.predict(torch.cat(states, dim=1)), model.logits(tokens).cpu(), 1e-4)
