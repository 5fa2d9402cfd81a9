import pytest
import torch
from torch import Tensor

from model.attention import attend
from model.segments import causal
from tests.live_bytes import LiveBytes


def _dense(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention of one document, by its definition: [S, H, K] and [S, H, V]."""
    logits = torch.einsum("shk,thk->hst", query, key) * scale
    ahead = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(ahead, float("-inf")).softmax(dim=-1)
    return torch.einsum("hst,thv->shv", weights, value)


SEGMENTS = [[10, 10], [3, 7, 10], [1, 8, 1, 4, 6], [3, 1, 6, 1, 6, 3], [1] * 20]


def random_heads(dtype: torch.dtype, *, key_heads: int, value_width: int) -> list[Tensor]:
    heads = ((4, 6), (key_heads, 6), (key_heads, value_width))
    return [torch.randn(2, 10, *shape, dtype=dtype, requires_grad=True) for shape in heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("value_width", [6, 4])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_attention_of_segments_equals_each_document_alone(
    segments: list[int], value_width: int, key_heads: int, dtype: torch.dtype
) -> None:
    inputs = random_heads(dtype, key_heads=key_heads, value_width=value_width)
    shared = [tensor.repeat_interleave(4 // tensor.shape[2], dim=2) for tensor in inputs]
    documents = zip(*(tensor.flatten(0, 1).split(segments) for tensor in shared), strict=True)
    wanted = torch.cat([_dense(q, k, v, scale=0.3) for q, k, v in documents])
    upstream = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad(wanted, inputs, upstream)

    mixed = attend(*inputs, scale=0.3, segments=segments).flatten(0, 1)
    grads = torch.autograd.grad(mixed, inputs, upstream)
    for got, expected in zip((mixed, *grads), (wanted, *wanted_grads), strict=True):
        # 1e-6 stands for a gradient that is zero: a token that sees only itself.
        assert (got - expected).abs().max() <= max(1e-5 * expected.abs().max(), 1e-6)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_segments_of_equal_length_share_a_product_without_another_bit(segments: list[int]) -> None:
    inputs = random_heads(torch.float32, key_heads=2, value_width=4)
    rows = [tensor.flatten(0, 1).split(segments) for tensor in inputs]
    alone = [causal(q[None], k[None], v[None], scale=0.3)[0] for q, k, v in zip(*rows, strict=True)]
    together = attend(*inputs, scale=0.3, segments=segments).flatten(0, 1)
    assert torch.equal(together, torch.cat(alone))
    upstream = torch.randn_like(together)
    for one, other in zip(
        torch.autograd.grad(together, inputs, upstream),
        torch.autograd.grad(torch.cat(alone), inputs, upstream),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_no_mask_of_all_pairs_is_ever_in_memory() -> None:
    """A mask or weights of a row's pairs of tokens would be larger than all that is allocated."""
    inputs = [torch.randn(1, 1024, 2, 8, requires_grad=True) for _ in range(3)]
    with LiveBytes() as live:
        attend(*inputs, scale=0.3, segments=[500, 24, 500]).sum().backward()
    assert live.peak < 1024 * 1024
