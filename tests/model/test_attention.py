import pytest
import torch
from torch import Tensor

from model.attention import attend


def _dense(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention of one document, by its definition: [S, H, K] and [S, H, V]."""
    logits = torch.einsum("shk,thk->hst", query, key) * scale
    ahead = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(ahead, float("-inf")).softmax(dim=-1)
    return torch.einsum("hst,thv->shv", weights, value)


@pytest.mark.parametrize("value_width", [6, 4])
@pytest.mark.parametrize("segments", [[10, 10], [3, 7, 10], [1, 8, 1, 4, 6], [1] * 20])
def test_attention_of_segments_equals_each_document_alone(
    segments: list[int], value_width: int
) -> None:
    inputs = [
        torch.randn(2, 10, 3, width, dtype=torch.float64, requires_grad=True)
        for width in (6, 6, value_width)
    ]
    documents = zip(*(tensor.flatten(0, 1).split(segments) for tensor in inputs), strict=True)
    wanted = torch.cat([_dense(q, k, v, scale=0.3) for q, k, v in documents])
    upstream = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad(wanted, inputs, upstream)

    mixed = attend(*inputs, scale=0.3, segments=segments)
    torch.testing.assert_close(mixed.flatten(0, 1), wanted)
    grads = torch.autograd.grad(mixed.flatten(0, 1), inputs, upstream)
    torch.testing.assert_close(grads, wanted_grads)
