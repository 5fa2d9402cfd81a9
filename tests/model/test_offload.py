"""Offloaded activations: the same bits back, and nothing big left behind."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from model import offload
from model.config import ModelConfig
from model.offload import Stash
from model.recompute import Recompute
from tests.live_bytes import LiveBytes
from tests.model.small import packed_batch, small_config, small_model

SEGMENTS = [4, 5, 9]


def train_once(config: ModelConfig, mode: Recompute, *, offloads: bool) -> list[Tensor]:
    model = small_model(config, recompute=mode, offloads=offloads)
    sums = model(*packed_batch([[4, 5], [9]]), segments=SEGMENTS)
    (sums.loss + 0.3 * sums.mtp_loss.sum() + 0.01 * sums.balance_loss).backward()
    return [*sums, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("limit", [None, 20])
@pytest.mark.parametrize("mode", Recompute)
def test_offload_changes_no_bit(mode: Recompute, limit: int | None) -> None:
    config = small_config(mtp_depth=1)
    config.moe.max_tokens_per_chunk = limit
    here, away = (train_once(config, mode, offloads=offloads) for offloads in (False, True))
    for wanted, got in zip(here, away, strict=True):
        assert torch.equal(wanted, got)


def chain(stash: Stash, *, length: int) -> tuple[Tensor, Tensor, list[weakref.ref[Tensor]]]:
    """Blocks that each save one tensor of 4000 bytes: input, output and what is saved."""
    x = torch.randn(1000, requires_grad=True)
    hidden, saved = x, []
    for _ in range(length):
        with stash.keeping():
            doubled = 2 * hidden
            saved.append(weakref.ref(doubled.untyped_storage()))
            hidden = doubled.sin()
        del doubled
    return x, hidden, saved


def test_all_but_the_last_two_blocks_tensors_leave() -> None:
    _, hidden, saved = chain(Stash(), length=5)
    assert [storage() is None for storage in saved] == [True, True, True, False, False]
    assert hidden.requires_grad


def test_a_stage_of_a_pipeline_lets_all_of_them_leave() -> None:
    stash = Stash()
    _, hidden, saved = chain(stash, length=3)
    stash.depart()
    assert all(storage() is None for storage in saved)
    assert hidden.requires_grad


def test_what_has_left_is_freed_once_it_was_used() -> None:
    with LiveBytes() as live:
        x, hidden, _ = chain(Stash(), length=6)
        (grad,) = torch.autograd.grad(hidden.sum(), x)
        del hidden
        gc.collect()
        assert live.now == x.untyped_storage().nbytes() + grad.untyped_storage().nbytes()
    plain = x
    for _ in range(6):
        plain = (2 * plain).sin()
    assert torch.equal(grad, torch.autograd.grad(plain.sum(), x)[0])


def test_under_full_recompute_only_blocks_inputs_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    copy = offload._copy
    monkeypatch.setattr(
        offload, "_copy", lambda to, what: (sent.append(to.numel()), copy(to, what))[1]
    )
    config = small_config()
    model = small_model(config, recompute=Recompute.full, offloads=True)
    model(*packed_batch([[9, 9]]), segments=[9, 9])
    hidden = 18 * config.dim * 4
    assert sent.count(hidden) == config.num_layers
    assert sum(sent) - config.num_layers * hidden < hidden  # the rest: which tokens are padding


def test_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    sent = []
    pack = offload._Load.pack

    def note(load: offload._Load, tensor: Tensor) -> object:
        packed = pack(load, tensor)
        if isinstance(packed, offload.Away):
            sent.append(tensor.untyped_storage().data_ptr())
        return packed

    monkeypatch.setattr(offload._Load, "pack", note)
    model = small_model(config, offloads=True)
    model(*packed_batch([[9]]), segments=[9])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert sent
    assert weights.isdisjoint(sent)
