from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.loss import IGNORED
from model.mtp import shift_back, shift_targets
from model.rope import rotation
from model.transformer import Transformer
from tests.model.small import Batch, packed_batch, small_config, small_model


def test_targets_shift_within_their_document_only() -> None:
    x = IGNORED
    targets = torch.tensor([[11, 12, 13, x, 21, x, 31, 32]])  # documents of 4, 2 and 2
    assert shift_targets(targets, 1).tolist() == [[12, 13, x, x, x, x, 32, x]]
    assert shift_targets(targets, 2).tolist() == [[13, x, x, x, x, x, x, x]]
    assert torch.equal(shift_targets(targets, 0), targets)


def test_shifting_past_the_row_gives_zeros() -> None:
    assert shift_back(torch.tensor([[1, 2, 3]]), 2).tolist() == [[3, 0, 0]]
    assert shift_back(torch.ones(1, 3, 2), 1)[0].tolist() == [[1, 1], [1, 1], [0, 0]]


def _document_by_document(model: Transformer, batch: Batch, segments: list[int]) -> list[Tensor]:
    """Each depth's summed loss, documents alone and places one by one (2412.19437, 2.2)."""
    config = model.config
    losses = [torch.zeros(()) for _ in model.mtp]
    start = 0
    for length in segments:
        tokens = batch.tokens.flatten()[start : start + length]
        start += length
        positions = torch.arange(length)[None]
        turn = rotation(config.rope, positions, dim=config.attention.rope_head_dim)
        counted = torch.ones(1, length, dtype=torch.bool)
        hidden = model.embed(tokens)[None]
        for layer in model.layers:
            hidden = layer(hidden, turn, counted, segments=[length]).hidden
        hidden = model.norm(hidden)
        for depth, mtp in enumerate(model.mtp, start=1):
            if length <= depth:
                break
            places = range(length - depth)  # those whose token `depth` further on exists
            joined = torch.stack(
                [
                    torch.cat(
                        (
                            mtp.embed_norm(model.embed(tokens[place + depth])),
                            mtp.hidden_norm(hidden[0, place]),
                        )
                    )
                    for place in places
                ]
            )
            turn = rotation(
                config.rope, positions[:, : len(places)], dim=config.attention.rope_head_dim
            )
            out = mtp.block(
                mtp.project(joined)[None], turn, counted[:, : len(places)], segments=[len(places)]
            )
            hidden = mtp.norm(out.hidden)
            for place in places:
                target = place + depth + 1
                if target < length:
                    logits = model.head(hidden[0, place])
                    losses[depth - 1] = losses[depth - 1] + F.cross_entropy(logits, tokens[target])
    return losses


@pytest.mark.parametrize("rows", [[[9], [9]], [[4, 5], [2, 1, 6]]])
@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_equals_documents_alone_place_by_place(depth: int, rows: list[list[int]]) -> None:
    model = small_model(small_config(mtp_depth=depth))
    batch, segments = packed_batch(rows), list(chain(*rows))
    wanted = torch.stack(_document_by_document(model, batch, segments))
    parameters = dict(model.named_parameters())
    wanted_grads = torch.autograd.grad(
        wanted.sum(), parameters.values(), allow_unused=True, materialize_grads=True
    )
    sums = model(*batch, segments=segments)
    torch.testing.assert_close(sums.mtp_loss, wanted, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(
        sums.mtp_loss.sum(), parameters.values(), allow_unused=True, materialize_grads=True
    )
    for name, grad, wanted_grad in zip(parameters, grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-5, msg=name)


def test_mtp_counts_only_places_whose_later_token_exists() -> None:
    model = small_model(small_config(mtp_depth=2))
    batch = packed_batch([[9], [9]])
    batch.counted[1, 5:] = False  # padding
    load = model(*batch, segments=[9, 9]).load
    assert load.sum(dim=-1).tolist() == [3 * 14, 3 * (14 - 2), 3 * (14 - 4)]
    assert len(load) == len(model.routers())


def test_mtp_leaves_the_next_token_loss_alone() -> None:
    batch, segments = packed_batch([[4, 5]]), [4, 5]
    without = small_model(small_config())(*batch, segments=segments)
    with_mtp = small_model(small_config(mtp_depth=1))(*batch, segments=segments)
    assert torch.equal(with_mtp.loss, without.loss)
    assert without.mtp_loss.shape == (0,)
