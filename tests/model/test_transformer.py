"""The model as training uses it."""

from itertools import chain

import pytest
import torch
from torch import Tensor

from model.config import GQAModelConfig, ModelConfig
from model.gqa import GQAConfig
from model.transformer import Sums
from tests.model.small import packed_batch, small_config, small_model


def _total(sums: Sums) -> Tensor:
    return sums.loss + 0.3 * sums.mtp_loss.sum() + 0.01 * sums.balance_loss


def grouped_queries() -> ModelConfig:
    config = small_config(mtp_depth=2)
    return GQAModelConfig(
        vocab_size=config.vocab_size,
        dim=config.dim,
        num_layers=config.num_layers,
        ffn_dim=config.ffn_dim,
        attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=6),
        moe=config.moe,
        mtp=config.mtp,
    )


@pytest.mark.parametrize(
    "config", [small_config(mtp_depth=2), grouped_queries()], ids=["mla", "gqa"]
)
def test_packed_documents_equal_each_document_alone(config: ModelConfig) -> None:
    model = small_model(config)
    rows = [[4, 5], [2, 1, 6]]
    packed, segments = packed_batch(rows), list(chain(*rows))
    sums = model(*packed, segments=segments)
    wanted_loss, wanted_mtp = torch.zeros(()), torch.zeros(2)
    for alone in zip(*(tensor.flatten().split(segments) for tensor in packed), strict=True):
        document = model(*(tensor[None] for tensor in alone), segments=[len(alone[0])])
        wanted_loss, wanted_mtp = wanted_loss + document.loss, wanted_mtp + document.mtp_loss
    torch.testing.assert_close(sums.loss, wanted_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.mtp_loss, wanted_mtp, rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(_total(sums._replace(balance_loss=0.0)), parameters)
    wanted = torch.autograd.grad(wanted_loss + 0.3 * wanted_mtp.sum(), parameters)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)
    for grad, expected in zip(grads, wanted, strict=True):
        assert (grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_splitting_a_batch_adds_up_to_the_whole() -> None:
    model = small_model(small_config(mtp_depth=1))
    batch = packed_batch([[4, 5], [9]])
    whole = model(*batch, segments=[4, 5, 9])
    top = model(*(tensor[:1] for tensor in batch), segments=[4, 5])
    bottom = model(*(tensor[1:] for tensor in batch), segments=[9])
    for name, all_of_it, *parts in zip(Sums._fields, whole, top, bottom, strict=True):
        torch.testing.assert_close(all_of_it, parts[0] + parts[1], msg=name)


def test_padding_adds_to_no_sum() -> None:
    model = small_model(small_config(mtp_depth=1))
    batch = packed_batch([[7]])
    padding = torch.zeros(1, 3, dtype=torch.int64)
    padded = [
        torch.cat((tensor, filler.to(tensor.dtype)), dim=1)
        for tensor, filler in zip(batch, (padding, padding - 100, padding, padding), strict=True)
    ]
    sums = model(*batch, segments=[7])
    with_padding = model(*padded, segments=[7, 3])
    for name, wanted, actual in zip(Sums._fields, sums, with_padding, strict=True):
        torch.testing.assert_close(actual, wanted, msg=name)


def test_every_parameter_gets_a_gradient() -> None:
    model = small_model(small_config(mtp_depth=2))
    sums = model(*packed_batch([[2]]), segments=[2])  # too short for most experts and for MTP
    _total(sums).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_model_of_dense_layers_alone_has_no_load() -> None:
    config = small_config(mtp_depth=1)
    config.num_dense_layers = config.num_layers
    model = small_model(config)
    sums = model(*packed_batch([[5]]), segments=[5])
    assert sums.load.shape == (0, 0)
    assert sums.balance_loss == 0.0
    assert model.routers() == {}
    _total(sums).backward()


def test_bf16_stays_near_fp32() -> None:
    config = small_config(mtp_depth=1)
    batch = packed_batch([[4, 5], [9]])
    wanted = small_model(config)(*batch, segments=[4, 5, 9])
    sums = small_model(config).bfloat16()(*batch, segments=[4, 5, 9])
    assert sums.loss.dtype == torch.float32
    torch.testing.assert_close(sums.loss, wanted.loss, rtol=0.05, atol=0)
    torch.testing.assert_close(sums.mtp_loss, wanted.mtp_loss, rtol=0.05, atol=0)
