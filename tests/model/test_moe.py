"""Dispatch, experts and combine together, on one rank and on several."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.balance import count_load, sequence_balance_loss
from model.dispatch import invert, swap_runs
from model.init import initialise
from model.moe import MoE, MoEConfig, check_moe
from model.router import RouterConfig
from tests.ranks import ranks

DIM = 12
CONFIG = MoEConfig(
    num_experts=8, top_k=3, expert_dim=6, num_shared_experts=2, router=RouterConfig()
)


def make_moe(config: MoEConfig = CONFIG, *, expert_group: dist.ProcessGroup | None = None) -> MoE:
    moe = MoE(config, dim=DIM, expert_group=expert_group)
    initialise(moe, seed=3, std=0.5)
    return moe.double()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=generator)


def token_by_token(moe: MoE, x: Tensor) -> Tensor:
    """The layer's definition: for each token, the weighted sum over its experts."""
    routing = moe.router(x.flatten(0, 1))
    outputs = []
    for token, ids, weights in zip(
        x.flatten(0, 1), routing.expert_ids.tolist(), routing.weights, strict=True
    ):
        result = torch.zeros_like(token) if moe.shared is None else moe.shared(token)
        for expert, weight in zip(ids, weights, strict=True):
            gate, up, down = (
                stack[expert] for stack in (moe.experts.gate, moe.experts.up, moe.experts.down)
            )
            result = result + weight * (down @ (F.silu(gate @ token) * (up @ token)))
        outputs.append(result)
    return torch.stack(outputs).view_as(x)


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("num_shared_experts", [0, 2])
def test_layer_and_gradients_equal_a_loop_over_tokens(top_k: int, num_shared_experts: int) -> None:
    moe = make_moe(replace(CONFIG, top_k=top_k, num_shared_experts=num_shared_experts))
    x = random_tokens(2, 5).requires_grad_()
    wanted = token_by_token(moe, x)
    upstream = torch.randn_like(wanted)
    inputs = (x, *moe.parameters())
    wanted_grads = torch.autograd.grad(wanted, inputs, upstream, allow_unused=True)

    out = moe(x, torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(out.hidden, wanted, rtol=1e-6, atol=1e-6)  # routing is fp32
    grads = torch.autograd.grad(out.hidden, inputs, upstream)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-6)


def test_experts_without_tokens_get_zero_gradients_not_none() -> None:
    moe = make_moe()
    moe.router.bias[5:] = -100.0  # nobody chooses these
    out = moe(random_tokens(1, 4), torch.ones(1, 4, dtype=torch.bool))
    out.hidden.sum().backward()
    assert out.load[5:].sum() == 0
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[5:].any()
        assert parameter.grad[:5].any()


def test_load_and_balance_loss_leave_out_what_is_not_counted() -> None:
    moe = make_moe()
    x = random_tokens(2, 5)
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[1, 2:] = False
    out = moe(x, counted)
    routing = moe.router(x.flatten(0, 1))
    expert_ids, scores = (
        tensor.unflatten(0, (2, 5)) for tensor in (routing.expert_ids, routing.scores)
    )
    assert out.load.sum() == 7 * CONFIG.top_k
    assert torch.equal(out.load, count_load(expert_ids, counted, num_experts=8))
    torch.testing.assert_close(out.balance_loss, sequence_balance_loss(scores, expert_ids, counted))


def _distributed_equals_local(*, tokens_of_rank: int) -> None:
    group, rank, num_ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    all_x = [random_tokens(1, tokens_of_rank, seed=r) for r in range(num_ranks)]
    upstream = random_tokens(1, tokens_of_rank, seed=100)
    counted = torch.ones(1, tokens_of_rank, dtype=torch.bool)

    local = make_moe()
    local_x = [x.clone().requires_grad_() for x in all_x]
    local_outs = [local(x, counted) for x in local_x]
    sum((out.hidden * upstream).sum() for out in local_outs).backward()

    spread = make_moe(expert_group=group)
    assert spread.experts.gate.shape[0] == CONFIG.num_experts // num_ranks
    x = all_x[rank].clone().requires_grad_()
    out = spread(x, counted)
    (out.hidden * upstream).sum().backward()

    torch.testing.assert_close(out.hidden, local_outs[rank].hidden)
    assert torch.equal(out.load, local_outs[rank].load)
    torch.testing.assert_close(x.grad, local_x[rank].grad)
    mine = slice(spread.experts.first, spread.experts.first + spread.experts.gate.shape[0])
    for name, parameter in spread.experts.named_parameters():
        wanted = local.experts.get_parameter(name)
        assert torch.equal(parameter, wanted[mine])
        torch.testing.assert_close(parameter.grad, wanted.grad[mine])
    for parameter in [*spread.router.parameters(), *spread.shared.parameters()]:
        dist.all_reduce(parameter.grad)
    torch.testing.assert_close(spread.router.weight.grad, local.router.weight.grad)
    torch.testing.assert_close(spread.shared.down.weight.grad, local.shared.down.weight.grad)


@pytest.mark.parametrize("tokens_of_rank", [1, 9])
@ranks(2)
def test_experts_over_two_ranks_equal_local_ones(tokens_of_rank: int) -> None:
    _distributed_equals_local(tokens_of_rank=tokens_of_rank)


@pytest.mark.parametrize("tokens_of_rank", [1, 9])
@ranks(4)
def test_experts_over_four_ranks_equal_local_ones(tokens_of_rank: int) -> None:
    _distributed_equals_local(tokens_of_rank=tokens_of_rank)


@ranks(2)
def test_a_rank_whose_experts_nobody_chooses_takes_part() -> None:
    moe = make_moe(expert_group=dist.group.WORLD)
    moe.router.bias[4:] = -100.0
    x = random_tokens(1, 6, seed=dist.get_rank()).requires_grad_()
    moe(x, torch.ones(1, 6, dtype=torch.bool)).hidden.sum().backward()
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None
        assert parameter.grad.any() == (dist.get_rank() == 0)


@ranks(2)
def test_experts_over_two_ranks_equal_local_ones_in_bf16() -> None:
    moe = make_moe().bfloat16()
    spread = make_moe(expert_group=dist.group.WORLD).bfloat16()
    x = random_tokens(1, 6, seed=dist.get_rank()).bfloat16()
    counted = torch.ones(1, 6, dtype=torch.bool)
    torch.testing.assert_close(spread(x, counted).hidden, moe(x, counted).hidden)


def test_runs_of_ranks_become_runs_of_experts() -> None:
    # Rank 0 sent 2 rows for expert 0 and 1 for expert 1, rank 1 sent 1 and 2.
    places = swap_runs(torch.tensor([[2, 1], [1, 2]]), total=6)
    assert places.tolist() == [0, 1, 3, 2, 4, 5]
    assert invert(places)[places].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_experts", 0), ("expert_dim", 0), ("num_shared_experts", -1), ("top_k", 9)],
)
def test_sizes_that_make_no_layer_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"model\.moe\.{field}={value}"):
        check_moe(replace(CONFIG, **{field: value}))
