"""The kernels of BF16 and fp32 equal plain PyTorch: in Triton's interpreter, or on a GPU.

`pip install 'thrifty[kernels]'`; without triton these tests are skipped. The interpreter has no
products of BF16, so that grouped products run in fp32 there.
"""

import math
from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import backends, dispatch, rope
from model.backends import Backend, Choice, KernelsConfig, Wanted, set_kernels
from model.recompute import Recompute
from model.router import GroupScore, RouterConfig, Score, route
from tests.model.small import packed_batch, small_config, small_model
from tests.model.triton_devices import ON_DEVICES, kernel, randn

pytestmark = ON_DEVICES

COUNTS = [[3, 0, 140, 1], [0, 0, 0, 7], [129, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


def with_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    """The result, and the gradients of all inputs of floats."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    result = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [result, *torch.autograd.grad(result, wanted, upstream.to(result.device, result.dtype))]


def assert_same(
    device: str,
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: list[Tensor],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> None:
    """Equal results and gradients, NaN where NaN is."""
    upstream = randn(*plain(*inputs).shape, seed=99)
    wanted = with_gradients(plain, inputs, upstream)
    got = with_gradients(ours, [x.to(device) for x in inputs], upstream)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.cpu(), other, rtol=rtol, atol=atol, equal_nan=True)


def loop(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    pairs = zip(rows.split(counts), weights, strict=True)
    return torch.cat([x @ weight.t() for x, weight in pairs])


@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_products_and_their_gradients_are_a_loops(device: str, counts: list[int]) -> None:
    inputs = [randn(sum(counts), 70), randn(4, 133, 70, seed=1)]
    rounding = {"rtol": 1e-5, "atol": 1e-4}
    if device == "cuda":
        inputs = [x.bfloat16() for x in inputs]
        rounding = {"rtol": 2e-2, "atol": 0.1}

    def ours(rows: Tensor, weights: Tensor) -> Tensor:
        return kernel("grouped_bf16").grouped_product(rows, weights, counts)

    assert_same(device, ours, lambda *inputs: loop(*inputs, counts), inputs, **rounding)


def test_what_is_not_finite_stays_in_its_row_and_with_its_expert(device: str) -> None:
    counts, dtype = [2, 0, 3], torch.bfloat16 if device == "cuda" else torch.float32
    rows, weights = randn(5, 40).to(dtype), randn(3, 20, 40, seed=1).to(dtype)
    rows[1, 3], weights[2, 5, 7] = math.nan, math.inf
    got = kernel("grouped_bf16").multiply(rows.to(device), weights.to(device), counts).cpu()
    assert got[1].isnan().all()
    assert (~got[2:, 5].isfinite()).all()
    assert got[0].isfinite().all()
    assert got[2:, :5].isfinite().all()
    outer = kernel("grouped_bf16").outer(
        randn(5, 20).to(device, dtype), rows.to(device), counts, torch.float32
    )
    assert outer[0, :, 3].isnan().all()
    assert outer[2].isfinite().all()
    assert not outer[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 100), (1, 1), (65, 33), (0, 8)])
def test_rms_norm_and_its_gradients_are_torchs(
    device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = [randn(*shape).to(dtype), randn(shape[-1], seed=1).to(dtype)]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_same(
        device,
        lambda x, gain: kernel("norm").rms_norm(x, gain, 1e-6),
        lambda x, gain: F.rms_norm(x, gain.shape, gain, 1e-6),
        inputs,
        rtol=tolerance,
        atol=tolerance,
    )


def test_rms_norm_of_tiny_huge_and_undefined_rows(device: str) -> None:
    x = randn(6, 40)
    x[0] *= 1e-30
    x[1] *= 1e15
    x[2] = 0
    x[3, 4], x[4, 5] = math.nan, math.inf
    gain = torch.ones(40)
    got = kernel("norm").rms_norm(x.to(device), gain.to(device), 1e-6).cpu()
    wanted = F.rms_norm(x, (40,), gain, 1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width", "rotated"), [(3, 16, 8), (9, 5, 6), (1, 128, 64)])
def test_rope_beside_what_is_not_turned_is_the_references(
    device: str, heads: int, width: int, rotated: int, dtype: torch.dtype
) -> None:
    angles = randn(2, 7, rotated // 2)
    by = rope.Rotation(angles.cos(), angles.sin())
    there = rope.Rotation(*(part.to(device) for part in by))
    whole = randn(2, 7, heads, width + rotated, seed=1).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    rounding = {"rtol": tolerance, "atol": tolerance}
    assert_same(
        device,
        lambda x: kernel("rope").turn_tail(x, *there),
        lambda x: rope.turn_tail(x, by),
        [whole],
        **rounding,
    )
    # As in MLA: slices of wider tensors, and of which all heads share the turned part.
    wide = randn(2, 7, heads, width + 3, seed=2).to(dtype)
    shared = randn(2, 7, 1, rotated, seed=3).to(dtype)
    assert_same(
        device,
        lambda x, shared: kernel("rope").join_turned(x[..., :width], shared, *there),
        lambda x, shared: rope.join_turned(x[..., :width], shared, by),
        [wide, shared],
        rtol=tolerance,
        atol=tolerance * heads,
    )


def test_one_rotation_for_all_sequences_turns_each(device: str) -> None:
    angles = randn(1, 7, 3).expand(4, -1, -1)
    by = rope.Rotation(angles.cos(), angles.sin())
    x = randn(4, 7, 2, 10)
    got = kernel("rope").turn_tail(x.to(device), *(part.to(device) for part in by)).cpu()
    torch.testing.assert_close(got, rope.turn_tail(x, by))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(7, 3, 40), (1, 1, 1), (4, 8, 1030)])
def test_rows_out_and_back_are_the_references(
    device: str, tokens: int, top_k: int, width: int, dtype: torch.dtype
) -> None:
    order = torch.randperm(tokens * top_k, generator=torch.manual_seed(3))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    rounding = {"rtol": tolerance, "atol": tolerance * width**0.5}
    assert_same(
        device,
        lambda x: kernel("rows").permute(x, order.to(device), top_k),
        lambda x: dispatch.permute(x, order, top_k=top_k),
        [randn(tokens, width).to(dtype)],
        **rounding,
    )
    assert_same(
        device,
        lambda rows, weights: kernel("rows").combine(rows, weights, order.to(device)),
        lambda rows, weights: dispatch.combine(rows, weights, order),
        [
            randn(tokens * top_k, width, seed=1).to(dtype),
            randn(tokens, top_k, seed=2).abs().to(dtype),
        ],
        **rounding,
    )


def test_a_row_that_is_not_finite_reaches_its_own_places_only(device: str) -> None:
    rows = randn(3, 5)
    rows[1, 2], rows[2, 0] = math.nan, math.inf
    places = torch.tensor([2, 0, 1, 0])
    got = kernel("rows").gather(rows.to(device), places.to(device)).cpu()
    torch.testing.assert_close(got, rows[places], rtol=0, atol=0, equal_nan=True)


ROUTERS = [
    (6, 2, RouterConfig()),
    (20, 6, RouterConfig(score=Score.softmax, renormalise=False, bias=False)),
    (20, 3, RouterConfig(num_groups=5, top_groups=2, group_score=GroupScore.max, scale=16.0)),
    (24, 8, RouterConfig(num_groups=4, top_groups=2, scale=2.5)),
    (1, 1, RouterConfig()),
]


@pytest.mark.parametrize(("experts", "top_k", "config"), ROUTERS)
def test_experts_weights_and_gradients_of_the_router_are_the_references(
    device: str, experts: int, top_k: int, config: RouterConfig
) -> None:
    logits, bias = randn(13, experts), 0.1 * randn(experts, seed=1)
    is_sigmoid = config.score is Score.sigmoid
    scores = logits.sigmoid() if is_sigmoid else logits.softmax(dim=-1)
    wanted = route(scores.requires_grad_(), bias, config=config, top_k=top_k)
    there = scores.detach().to(device).requires_grad_()
    with mock.patch("model.router.choose_router", return_value=mock.Mock(backend="triton")):
        got = route(there, bias.to(device), config=config, top_k=top_k)
    ids, order = got.expert_ids.cpu().sort(dim=-1)
    wanted_ids, wanted_order = wanted.expert_ids.sort(dim=-1)
    assert torch.equal(ids, wanted_ids)
    weights = got.weights.cpu().gather(1, order)
    wanted_weights = wanted.weights.gather(1, wanted_order)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=0)
    upstream = randn(13, top_k, seed=2)
    (grad,) = torch.autograd.grad(weights, there, upstream)
    (wanted_grad,) = torch.autograd.grad(wanted_weights, scores, upstream)
    torch.testing.assert_close(grad.cpu(), wanted_grad, rtol=1e-4, atol=1e-5)


def test_equal_scores_and_undefined_ones_give_each_token_different_experts(device: str) -> None:
    scores = torch.full((4, 12), 0.5)
    scores[1], scores[2], scores[3, 5] = 0.0, math.nan, math.nan
    rule = kernel("router").Rule(3, 4, 2, False, True, 1.0)
    ids, weights = (one.cpu() for one in kernel("router").choose(scores.to(device), None, rule))
    assert all(len(set(row)) == 3 and set(row) <= set(range(12)) for row in ids.tolist())
    torch.testing.assert_close(weights[0], torch.full((3,), 1 / 3))
    assert not weights[1].any()
    assert weights[2].isnan().all()
    assert ids[3, 0] == 5  # as in torch, what is undefined comes first: it never hides
    assert weights[3].isnan().all()


@pytest.mark.parametrize(
    "recompute",
    [pytest.param(r, marks=[] if r is Recompute.none else pytest.mark.slow) for r in Recompute],
)
def test_a_model_on_kernels_equals_a_model_without(device: str, recompute: Recompute) -> None:
    """Losses, loads and all gradients."""
    batch, lengths = packed_batch([[9, 3], [12]]), [9, 3, 12]
    calls: Counter[str] = Counter()

    def results(wanted: Wanted) -> list[Tensor]:
        model = small_model(small_config(mtp_depth=1), recompute=recompute).to(device)
        set_kernels(KernelsConfig(**dict.fromkeys(("norm", "rope", "router", "rows"), wanted)))
        sums = model(*(part.to(device) for part in batch), segments=lengths)
        total = sums.loss + sums.mtp_loss.sum() + sums.balance_loss
        grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        return [total, sums.load, *(grad for grad in grads if grad is not None)]

    def by_kernel(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        calls["experts"] += 1
        return kernel("grouped_bf16").grouped_product(rows, weights, counts)

    # On a GPU the kernel's products of fp32 are of TF32, which moves routings.
    in_fp32 = Backend.triton if device == "cpu" else Backend.reference
    experts = Choice("experts", in_fp32, "")
    with (
        mock.patch.object(backends, "_missing", return_value=None),
        mock.patch.object(backends, "_name", return_value="here"),
    ):
        try:
            wanted = results(Wanted.reference)
            with (
                mock.patch("model.grouped.choose_experts", return_value=experts),
                mock.patch("model.grouped._by_kernel", by_kernel),
            ):
                got = results(Wanted.triton)
        finally:
            set_kernels(KernelsConfig())
    assert device == "cuda" or calls["experts"] >= 3
    assert torch.equal(got[1], wanted[1])
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
