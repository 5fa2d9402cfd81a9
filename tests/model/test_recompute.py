"""Recomputation: the same bits, fewer bytes kept, nothing sent twice that need not be."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.block import Block
from model.config import GQAModelConfig, ModelConfig
from model.fp8_memory import kept_bytes_per_token
from model.gqa import GQAConfig
from model.init import initialise
from model.memory import kept_per_token
from model.products import use_fp8
from model.recompute import Recompute, rebuild, rebuilding, recomputed
from model.rope import rotation
from model.sequences import WholeSequences
from tests.live_bytes import LiveBytes
from tests.model.small import packed_batch, small_config, small_model
from tests.ranks import ranks

ROWS, SEGMENTS = [[4, 5], [9]], [4, 5, 9]


def without_query_compression() -> ModelConfig:
    config = small_config(mtp_depth=1)
    config.attention.q_lora_rank = None
    return config


def grouped_queries() -> ModelConfig:
    return GQAModelConfig(
        vocab_size=48,
        dim=16,
        num_layers=2,
        ffn_dim=24,
        attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=6, qkv_bias=True),
        moe=small_config().moe,
    )


KINDS: dict[str, Callable[[], ModelConfig]] = {
    "mla": lambda: small_config(mtp_depth=2),
    "mla without query compression": without_query_compression,
    "gqa": grouped_queries,
    "dense": lambda: replace(small_config(mtp_depth=1), num_dense_layers=2),
}


def train_once(
    config: ModelConfig, mode: Recompute, *, group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """All sums of a step and the gradient of every parameter."""
    model = small_model(config, recompute=mode, expert_group=group)
    sums = model(*packed_batch(ROWS), segments=SEGMENTS)
    (sums.loss + 0.3 * sums.mtp_loss.sum() + 0.01 * sums.balance_loss).backward()
    return [*sums, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("mode", [Recompute.selective, Recompute.full])
@pytest.mark.parametrize("kind", KINDS)
def test_recompute_changes_no_bit_of_loss_gradients_or_load(kind: str, mode: Recompute) -> None:
    plain, recomputed = (train_once(KINDS[kind](), m) for m in (Recompute.none, mode))
    for wanted, got in zip(plain, recomputed, strict=True):
        assert torch.equal(wanted, got)


@pytest.mark.parametrize("mode", [Recompute.selective, Recompute.full])
@ranks(2)
def test_recompute_changes_no_bit_over_ranks(mode: Recompute) -> None:
    config = small_config(mtp_depth=1)
    plain, recomputed = (
        train_once(config, m, group=dist.group.WORLD) for m in (Recompute.none, mode)
    )
    for wanted, got in zip(plain, recomputed, strict=True):
        assert torch.equal(wanted, got)


@ranks(2)
def test_selective_recompute_exchanges_rows_as_often_as_none() -> None:
    config, calls = small_config(mtp_depth=1), []
    exchange = dist.all_to_all_single
    for mode in (Recompute.none, Recompute.selective):
        with patch.object(dist, "all_to_all_single", side_effect=exchange) as counted:
            train_once(config, mode, group=dist.group.WORLD)
        calls.append(counted.call_count)
    assert calls[0] == calls[1] == 2 * 4  # MoE layers; there and back, forward and backward


def bytes_kept(
    config: ModelConfig,
    mode: Recompute,
    *,
    is_dense: bool,
    seq_len: int,
    is_fp8: bool = False,
    in_halves: bool = False,
) -> int:
    """What stays allocated between a block's forward and backward pass, its input included.

    Of one sequence; `in_halves` of two.
    """
    block = Block(
        config,
        is_dense=is_dense,
        expert_group=None,
        sequences=WholeSequences(),
        in_halves=in_halves,
    )
    initialise(block, seed=1, std=0.4)
    if is_fp8:
        use_fp8(block)
    count = 2 if in_halves else 1
    positions = torch.arange(seq_len).expand(count, seq_len)
    turn = rotation(config.rope, positions, dim=config.attention.rotated_dim)
    counted = torch.ones(count, seq_len, dtype=torch.bool)
    with LiveBytes() as live:
        x = torch.randn(count, seq_len, config.dim).requires_grad_()
        out = recomputed(block, mode=mode)(x, turn, counted, segments=[seq_len] * count)
        hidden = out.hidden.untyped_storage().nbytes()  # the next block's input
    return live.now - hidden


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("mode", Recompute)
@pytest.mark.parametrize("kind", list(KINDS)[:3])
def test_a_block_keeps_the_bytes_that_the_formula_says(
    kind: str, mode: Recompute, is_dense: bool
) -> None:
    config = KINDS[kind]()
    short, long = (bytes_kept(config, mode, is_dense=is_dense, seq_len=n) for n in (32, 96))
    assert (long - short) / 64 == 4 * kept_per_token(config, is_dense=is_dense, recompute=mode)


@pytest.mark.parametrize("is_fp8", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", Recompute)
def test_a_block_in_halves_keeps_as_much_for_each_token(mode: Recompute, is_fp8: bool) -> None:
    config = small_config()
    _, short, long = (  # at its first use FP8 makes a table that stays
        bytes_kept(config, mode, is_dense=False, seq_len=n, is_fp8=is_fp8, in_halves=True)
        for n in (8, 32, 96)
    )
    assert (long - short) / 64 == 2 * kept_bytes_per_token(
        config, is_dense=False, recompute=mode, size=4, is_fp8=is_fp8
    )


def wide() -> ModelConfig:
    """Some widths are whole tiles, some not; the value is as wide as the key."""
    config = small_config()
    config.dim, config.ffn_dim = 256, 130
    config.attention.q_lora_rank, config.attention.v_head_dim = 128, 10
    config.moe.expert_dim = 200
    config.moe.num_shared_experts = 0
    return config


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("mode", Recompute)
@pytest.mark.parametrize("config", [*(KINDS[kind]() for kind in list(KINDS)[:3]), wide()])
def test_in_fp8_a_block_keeps_the_bytes_that_the_formula_says(
    config: ModelConfig, mode: Recompute, is_dense: bool
) -> None:
    _, short, long = (  # at its first use FP8 makes a table that stays
        bytes_kept(config, mode, is_dense=is_dense, seq_len=n, is_fp8=True) for n in (8, 32, 96)
    )
    assert (long - short) / 64 == kept_bytes_per_token(
        config, is_dense=is_dense, recompute=mode, size=4, is_fp8=True
    )


def test_a_result_is_rebuilt_once_however_many_keep_it_and_forgotten() -> None:
    runs = []

    def function(x: Tensor) -> Tensor:
        runs.append(1)
        return x.sin().exp()

    x = torch.randn(1000, requires_grad=True)
    with LiveBytes() as live:
        with rebuilding():
            y = rebuild(function, x)
            total = (y * y).sum() + y.view(10, 100)[3:].square().sum()
        del y
        assert live.now <= 8, "nothing but the sums is alive"
        (gradient,) = torch.autograd.grad(total, x)
    assert len(runs) == 2
    upstream = 2 * x.sin().exp() * (1 + (torch.arange(1000) >= 300))
    torch.testing.assert_close(gradient, upstream * x.sin().exp() * x.cos())
    assert live.now == gradient.untyped_storage().nbytes() + 4


def test_a_storage_in_the_place_of_a_freed_one_is_not_taken_for_it() -> None:
    x = torch.randn(1000, requires_grad=True)
    weight = torch.randn(1000)
    with rebuilding():
        for _ in range(20):  # each result is freed at once: its memory is reused by what follows
            rebuild(torch.sin, x)
            scale = weight * 2
            total = (x * scale).sum()
            del scale
    (gradient,) = torch.autograd.grad(total, x)
    assert torch.equal(gradient, weight * 2)
