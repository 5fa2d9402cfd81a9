"""What the benchmarks of `make gpu-check` measure is what they say."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import cut_step, fp8_training
from bench.balanced import force_balance
from bench.cut_step import MODEL, sizes_for
from bench.one_process import Trainee, make_replicated
from model.cost import count_parameters
from model.moe import MoE
from tests.ranks import ranks


@ranks(1)
def test_forced_balance_gives_every_expert_equally_many_tokens() -> None:
    sizes = sizes_for(torch.device("cpu"))
    trainee = Trainee(sizes.model, torch.device("cpu"), dtype=torch.bfloat16)
    loads: list[Tensor] = []
    for module in trainee.model.modules():
        if isinstance(module, MoE):
            module.register_forward_hook(lambda _, __, out: loads.append(out.load))
    tokens = cut_step.random_tokens(sizes, torch.device("cpu"), ahead=1)
    natural = trainee.step(tokens, lr=1e-3)
    force_balance(trainee.model)
    assert trainee.step(tokens, lr=1e-3) < natural, "the step before has learnt something"
    assert not (loads[0] == loads[0][0]).all()
    assert (loads[1] == loads[1][0]).all()


def test_the_models_have_the_sizes_that_the_benchmarks_name() -> None:
    cut = count_parameters(MODEL).total
    assert 18 * cut < 52e9, "bytes of weights, masters, gradients and moments on one GPU"
    assert count_parameters(replace(MODEL, num_layers=27)).total == pytest.approx(15.7e9, rel=0.01)
    trained = fp8_training.sizes_for(torch.device("cuda")).model
    assert count_parameters(trained).total >= 100e6


@pytest.mark.slow
@ranks(1)
def test_fp8_and_bf16_train_on_the_same_batches() -> None:
    device = torch.device("cpu")
    sizes, text = fp8_training.sizes_for(device), fp8_training.read_text()
    bf16, fp8 = (
        fp8_training.train(sizes, text, 30, device, is_fp8=is_fp8).losses
        for is_fp8 in (False, True)
    )
    assert bf16 != fp8
    assert fp8 == pytest.approx(bf16, rel=0.01)
    assert bf16[-1] < bf16[0] - 0.1


@pytest.mark.slow
@ranks(1)
def test_the_peer_trains_under_the_same_optimizer() -> None:
    pytest.importorskip("transformers")
    sizes = sizes_for(torch.device("cpu"))
    median, _ = cut_step.measure_theirs(sizes, torch.device("cpu"))
    assert median > 0
    weights = torch.nn.Linear(3, 3)
    replicated = make_replicated(weights, torch.bfloat16)
    assert all(master.dtype == torch.float32 for master in replicated.masters())
    assert weights.weight.dtype == torch.bfloat16
