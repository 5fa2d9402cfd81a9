"""Experts' rows in chunks: the same results, and what a rank receives at once is bounded."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.chunks import split_into_chunks
from model.halves import in_turns
from model.init import initialise
from model.memory import routed_peak
from model.moe import MoE, MoEConfig
from model.recompute import Recompute
from model.router import RouterConfig
from tests.live_bytes import LiveBytes
from tests.model.small import packed_batch, small_config, small_model
from tests.model.test_moe import CONFIG, make_moe, random_tokens, token_by_token
from tests.ranks import ranks, run_ranks

COUNTS = st.integers(1, 4).flatmap(
    lambda num_ranks: st.integers(1, 3).flatmap(
        lambda num_local: st.lists(
            st.lists(
                st.integers(0, 9), min_size=num_ranks * num_local, max_size=num_ranks * num_local
            ),
            min_size=num_ranks,
            max_size=num_ranks,
        )
    )
)


@given(counts=COUNTS, limit=st.integers(1, 30))
def test_chunks_are_parts_of_queues_within_the_limit(counts: list[list[int]], limit: int) -> None:
    num_ranks = len(counts)
    num_local = len(counts[0]) // num_ranks
    chunks = split_into_chunks(torch.tensor(counts), limit=limit)
    assert torch.equal(chunks.sum(dim=0), torch.tensor(counts))
    received = chunks.unflatten(2, (num_ranks, num_local)).sum(dim=(1, 3))  # [C, to]
    assert received.max() <= limit
    assert len(chunks) == max(1, -(-int(received.sum(dim=0).max()) // limit))
    for owner in range(num_ranks):
        queue = [
            (e, source)
            for e in range(owner * num_local, (owner + 1) * num_local)
            for source in range(num_ranks)
            for _ in range(counts[source][e])
        ]
        taken = [
            (e, source)
            for chunk in chunks
            for e in range(owner * num_local, (owner + 1) * num_local)
            for source in range(num_ranks)
            for _ in range(int(chunk[source, e]))
        ]
        if len(chunks) > 1:
            assert taken == queue


def skewed(moe: MoE, num_favoured: int) -> MoE:
    """The layer with only its first experts ever chosen."""
    moe.router.bias[num_favoured:] = -100.0
    return moe


@settings(deadline=None, max_examples=15)
@given(
    num_tokens=st.integers(1, 12),
    top_k=st.integers(1, 8),
    num_favoured=st.integers(1, 8),
    limit=st.integers(1, 40),
)
def test_chunks_here_equal_a_loop_over_tokens(
    num_tokens: int, top_k: int, num_favoured: int, limit: int
) -> None:
    config = replace(CONFIG, top_k=top_k, max_tokens_per_chunk=limit)
    moe = skewed(make_moe(config), max(top_k, num_favoured))
    x = random_tokens(1, num_tokens).requires_grad_()
    wanted = token_by_token(moe, x)
    upstream = torch.randn_like(wanted)
    of = (x, *moe.parameters())
    wanted_grads = torch.autograd.grad(wanted, of, upstream, allow_unused=True)
    with patch.object(MoE, "_visit", autospec=True, side_effect=MoE._visit) as visit:
        out = moe(x, torch.ones(1, num_tokens, dtype=torch.bool))
        assert visit.call_count == -(-num_tokens * top_k // limit)
    torch.testing.assert_close(out.hidden, wanted, rtol=1e-6, atol=1e-6)  # routing is fp32
    grads = torch.autograd.grad(out.hidden, of, upstream)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-6)


def chunked_equals_whole(config: MoEConfig, num_tokens: list[int], num_favoured: int) -> int:
    """Compare over the ranks of this group; returns how often this rank visited experts."""
    group, rank = dist.group.WORLD, dist.get_rank()
    x = random_tokens(1, num_tokens[rank], seed=rank)
    counted = torch.ones(1, num_tokens[rank], dtype=torch.bool)
    upstream = random_tokens(1, num_tokens[rank], seed=100 + rank)
    results: list[list[Tensor]] = []
    for limit in (None, config.max_tokens_per_chunk):
        moe = make_moe(replace(config, max_tokens_per_chunk=limit), expert_group=group)
        skewed(moe, max(config.top_k, num_favoured))
        of = (x.requires_grad_(), *moe.parameters())
        with patch.object(MoE, "_visit", autospec=True, side_effect=MoE._visit) as visit:
            out = moe(x, counted)
        num_visits = visit.call_count
        grads = torch.autograd.grad(out.hidden, of, upstream)
        assert moe.router(x.flatten(0, 1)).expert_ids.max() < max(config.top_k, num_favoured)
        results.append([out.load, out.balance_loss, out.hidden, *grads])
    (load, balance_loss, *whole), (load_of_chunks, balance_loss_of_chunks, *chunked) = results
    assert torch.equal(load_of_chunks, load)
    assert torch.equal(balance_loss_of_chunks, balance_loss)
    torch.testing.assert_close(chunked, whole)
    return num_visits


@settings(deadline=None, max_examples=6)
@given(
    num_tokens=st.lists(st.integers(1, 9), min_size=2, max_size=2),
    top_k=st.integers(1, 4),
    num_favoured=st.integers(1, 8),
    limit=st.integers(1, 25),
)
def test_chunks_over_two_ranks_equal_the_whole(
    num_tokens: list[int], top_k: int, num_favoured: int, limit: int
) -> None:
    config = replace(CONFIG, top_k=top_k, max_tokens_per_chunk=limit)
    visits = run_ranks(2, lambda: chunked_equals_whole(config, num_tokens, num_favoured))
    assert visits[0] == visits[1]


@pytest.mark.parametrize("limit", [1, 7])
@ranks(4)
def test_all_rows_for_one_of_four_ranks_equal_the_whole(limit: int) -> None:
    config = replace(CONFIG, top_k=2, max_tokens_per_chunk=limit)
    num_visits = chunked_equals_whole(config, [5, 1, 9, 3], num_favoured=2)
    assert num_visits == -(-2 * (5 + 1 + 9 + 3) // limit)


WIDE = MoEConfig(num_experts=8, top_k=2, expert_dim=48, num_shared_experts=0, router=RouterConfig())
WIDTH, TOKENS = 32, 128


def layer_peak(config: MoEConfig, *, is_skewed: bool, in_halves: bool = False) -> int:
    """Most bytes that a layer's forward and backward pass hold at once on this rank."""
    moe = MoE(config, dim=WIDTH, expert_group=dist.group.WORLD, in_halves=in_halves)
    initialise(moe, seed=3, std=0.5)
    if is_skewed:
        moe.router.bias[config.top_k :] = -100.0
    num_parts = 2 if in_halves else 1
    x = torch.randn(num_parts, TOKENS // num_parts, WIDTH, requires_grad=True)
    counted = torch.ones(1, TOKENS // num_parts, dtype=torch.bool)
    with LiveBytes() as live:
        outputs = in_turns(*(moe.steps(part, counted) for part in x.split(1)))
        torch.stack([output.hidden.sum() for output in outputs]).sum().backward()
    return live.peak


@pytest.mark.parametrize("limit", [32, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_layers_peak_under_total_imbalance_keeps_to_the_bound(num_ranks: int, limit: int) -> None:
    config = replace(WIDE, max_tokens_per_chunk=limit)
    bound = 4 * routed_peak(config, dim=WIDTH, tokens=TOKENS, num_local=8 // num_ranks)
    peak = max(run_ranks(num_ranks, lambda: layer_peak(config, is_skewed=True)))
    assert 0.6 * bound < peak <= bound, f"{peak} of {bound}"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [32, 128])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_two_halves_in_turns_keep_to_the_same_bound(num_ranks: int, limit: int) -> None:
    config = replace(WIDE, max_tokens_per_chunk=limit)
    bound = 4 * routed_peak(config, dim=WIDTH, tokens=TOKENS, num_local=8 // num_ranks)
    peaks = run_ranks(num_ranks, lambda: layer_peak(config, is_skewed=True, in_halves=True))
    assert 0.5 * bound < max(peaks) <= bound, f"{peaks} of {bound}"


def test_without_chunks_the_peak_grows_with_the_ranks_and_with_them_it_does_not() -> None:
    chunked = replace(WIDE, max_tokens_per_chunk=64)

    def peak(config: MoEConfig, num_ranks: int) -> int:
        return max(run_ranks(num_ranks, lambda: layer_peak(config, is_skewed=True)))

    whole, bounded = ([peak(config, n) for n in (2, 4)] for config in (WIDE, chunked))
    assert whole[1] > 1.7 * whole[0]
    assert bounded[1] <= bounded[0] < whole[0] / 2


def step_peak(limit: int | None, recompute: Recompute, *, is_skewed: bool) -> int:
    """The same of a whole model's forward and backward pass."""
    config = small_config(mtp_depth=1)
    config.num_dense_layers, config.num_layers = 0, 3
    config.moe.max_tokens_per_chunk = limit
    model = small_model(config, expert_group=dist.group.WORLD, recompute=recompute)
    if is_skewed:
        for router in model.routers().values():
            router.bias[config.moe.top_k :] = -100.0
    batch = packed_batch([[40]] * 2, seed=dist.get_rank())
    with LiveBytes() as live:
        sums = model(*batch, segments=[40] * 2)
        (sums.loss + sums.mtp_loss.sum() + sums.balance_loss).backward()
    return live.peak


@pytest.mark.parametrize(
    "recompute",
    [
        Recompute.none,
        pytest.param(Recompute.selective, marks=pytest.mark.slow),
        pytest.param(Recompute.full, marks=pytest.mark.slow),
    ],
)
def test_a_step_under_total_imbalance_needs_no_more_than_the_bound_above_a_balanced_one(
    recompute: Recompute,
) -> None:
    limit = 60
    moe = replace(small_config().moe, max_tokens_per_chunk=limit)
    bound = 4 * routed_peak(moe, dim=16, tokens=80, num_local=4)

    def peak(limit: int | None, *, is_skewed: bool) -> int:
        return max(run_ranks(2, lambda: step_peak(limit, recompute, is_skewed=is_skewed)))

    balanced = peak(None, is_skewed=False)
    assert peak(limit, is_skewed=True) <= balanced + bound
    if recompute is Recompute.none:
        assert peak(None, is_skewed=True) > balanced + bound
