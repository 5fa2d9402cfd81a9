"""The reference: the steps in plain PyTorch, in one process, nothing recomputed or spread.

Written from the papers' formulas beside the code it judges: of the training code only the model,
the initial weights and the optimizer's update are shared. No DeepSpeed, no engine, no
denominators, no dispatch between ranks.
"""

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from data.batches import Batch, collate
from data.samples import IGNORED, Sample
from model.backends import set_kernels
from model.config import ModelConfig
from model.init import initialise
from model.mtp import shift_targets
from model.router import Router
from model.transformer import Sums, Transformer
from train.checkpoint.manifest import Fragment
from train.config import RunConfig
from train.optimizer.adamw import AdamW
from train.optimizer.config import build_optimizer, parameter_groups
from train.precision import Dtype
from train.schedule import batch_size, model_at
from train.verify.forward_states import watch_forward
from train.verify.observation import (
    BUFFER,
    GRADIENT,
    LOSS,
    NORM,
    TERM,
    WEIGHT,
    Key,
    keep,
    keep_load,
    keep_states,
)
from train.verify.random_samples import RandomSamples, random_biases


def observe_plainly(
    config: RunConfig, *, steps: int, lr: float, device: torch.device, order: int = 0
) -> Iterator[Fragment]:
    """Everything that is compared, of `steps` steps on random samples.

    In order 0 the global batch is one micro-batch. In any other it is permuted and accumulated in
    small ones, which changes nothing but roundings. In BF16 the model is a rounded copy, while
    masters and accumulated gradients are fp32.
    """
    set_kernels(config.kernels)
    masters = Transformer(config.model)
    initialise(masters, seed=config.seed, std=config.model.init_std)
    buffers = [(name, buffer) for name, buffer in masters.named_buffers()]
    random_biases([Fragment(f"buffer/{n}", tuple(b.shape), 0, b) for n, b in buffers], config.model)
    masters.to(device)
    is_fp32 = config.precision.dtype is Dtype.fp32
    model = masters if is_fp32 else deepcopy(masters).to(config.precision.dtype.torch)
    optimizer = build_optimizer(parameter_groups(masters, config.optimizer), config.optimizer)
    samples, first = RandomSamples(config), 0
    for step in range(steps):
        size = batch_size(config.schedule, step)
        batch = [samples[i] for i in range(first, first + size)]
        first += size
        rows = shuffle(size, order=order)
        yield from _observe_step(step + 1, model, masters, optimizer, batch, rows, config, lr=lr)


def shuffle(size: int, *, order: int) -> list[list[int]]:
    """The rows of each micro-batch: single ones, pairs, and so on from order to order."""
    if order == 0:
        return [list(range(size))]
    permuted = torch.randperm(size, generator=torch.Generator().manual_seed(order))
    return [rows.tolist() for rows in permuted.split(order)]


def _observe_step(
    step: int,
    model: Transformer,
    masters: Transformer,
    optimizer: AdamW,
    samples: list[Sample],
    rows: list[list[int]],
    config: RunConfig,
    *,
    lr: float,
) -> Iterator[Fragment]:
    settings = model_at(config.model, config.schedule, step - 1)
    parameters = dict(masters.named_parameters())
    whole = collate(samples)
    total, load = Counter[str](), torch.zeros((), dtype=torch.int64)
    optimizer.zero_grad()
    with watch_forward(model) as states:
        for of_batch in rows:
            sums = _forward(model, collate([samples[row] for row in of_batch]))
            terms, losses = weigh(sums, whole, settings)
            if len(rows) == 1 and model is masters:
                yield from _observe_terms(step, terms, parameters)
            torch.stack(list(terms.values())).sum().backward()
            _accumulate(model, masters)
            total.update({name: float(loss.detach()) for name, loss in losses.items()})
            load = load.to(sums.load.device) + sums.load
    columns = range(config.data.seq_len)
    shape = (len(samples), config.data.seq_len)
    yield from keep_states(step, states, rows, columns, shape=shape)
    yield from keep_load(step, load, config.model)
    for name, value in total.items():
        yield keep(Key(step, LOSS, name), torch.tensor([value], dtype=torch.float64))

    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} takes part in the loss"
        yield keep(Key(step, GRADIENT, name), parameter.grad)
    clip = config.optimizer.clip_norm
    norm = nn.utils.clip_grad_norm_(parameters.values(), clip if clip > 0 else float("inf"))
    yield keep(Key(step, NORM, "global norm"), norm.double()[None])

    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    _balance(masters, load, settings)
    model.load_state_dict(masters.state_dict())
    for name, parameter in parameters.items():
        yield keep(Key(step, WEIGHT, name), parameter)
        for kind, values in optimizer.open_state(parameter).items():
            yield keep(Key(step, kind, name), values.view_as(parameter))
    for name, buffer in masters.named_buffers():
        yield keep(Key(step, BUFFER, name), buffer)


def _accumulate(model: Transformer, masters: Transformer) -> None:
    """Add a rounded copy's gradients to the masters' fp32 ones; the masters' own are there."""
    if model is masters:
        return
    for parameter, master in zip(model.parameters(), masters.parameters(), strict=True):
        assert parameter.grad is not None, "every parameter takes part in the loss"
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad + gradient
        parameter.grad = None


def _forward(model: Transformer, batch: Batch) -> Sums:
    device = next(model.parameters()).device
    tensors = [tensor.to(device) for tensor in batch[:4]]
    sums: Sums = model(*tensors, segments=batch.document_lengths)
    return sums


def weigh(
    sums: Sums, batch: Batch, config: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The loss's weighted terms, which add up to it, and the mean losses as they are reported.

    Main: mean over targets. MTP: weight times the mean over depths of means over targets
    (arXiv:2412.19437, 2.2). Balance: weights times means over sequences (2.1.2, and
    arXiv:2405.04434, 2.2.3, for devices and communication).
    """
    num_sequences = len(batch.targets)
    losses = {"main loss": sums.loss / (batch.targets != IGNORED).sum()}
    by_depth = {
        f"MTP loss, depth {depth}": nats / (shift_targets(batch.targets, depth) != IGNORED).sum()
        for depth, nats in enumerate(sums.mtp_loss, start=1)
    }
    terms = {"main loss": losses["main loss"]}
    if config.moe is not None:
        device, communication = sums.group_balance_losses / num_sequences
        for name, loss, weight in (
            ("balance loss", sums.balance_loss / num_sequences, config.moe.balance_loss_weight),
            ("device balance loss", device, config.moe.device_balance_loss_weight),
            (
                "communication balance loss",
                communication,
                config.moe.communication_balance_loss_weight,
            ),
        ):
            if name == "balance loss" or config.moe.has_group_balance_losses:
                losses[name] = loss
            if weight > 0:
                terms[name] = weight * loss
    if by_depth:
        mean = torch.stack(list(by_depth.values())).mean()
        terms["MTP loss"] = config.mtp.loss_weight * mean
    return terms, losses | by_depth


def _observe_terms(
    step: int, terms: dict[str, Tensor], parameters: dict[str, nn.Parameter]
) -> Iterator[Fragment]:
    """Each term's own gradient, on the few small parameters that all of them reach."""
    small = {name: p for name, p in parameters.items() if p.ndim == 1 or ".router." in name}
    for term, loss in terms.items():
        if not loss.requires_grad:
            continue
        gradients = torch.autograd.grad(
            loss, list(small.values()), retain_graph=True, allow_unused=True
        )
        for (name, parameter), gradient in zip(small.items(), gradients, strict=True):
            value = torch.zeros_like(parameter) if gradient is None else gradient
            yield keep(Key(step, TERM, f"{term}/{name}"), value)


@torch.no_grad()
def _balance(model: Transformer, load: Tensor, config: ModelConfig) -> None:
    """b_i += speed * sign(mean load - load_i) (arXiv:2408.15664), where routers have a bias."""
    if config.moe is None or not config.moe.router.bias:
        return
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, of_layer in zip(routers, load.double(), strict=True):
        step = config.moe.router.bias_update_speed * torch.sign(of_layer.mean() - of_layer)
        router.bias.add_(step.float())
