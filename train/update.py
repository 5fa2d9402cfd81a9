"""One optimizer step: a global batch in, new weights and the step's numbers out."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float64, Int64
from torch import Tensor

from data.batches import Batch
from model.balance import step_bias
from model.config import ModelConfig
from model.transformer import Sums
from model.whereabouts import HERE
from train.engine.engine import Engine
from train.ranks import Ranks


class Denominators(NamedTuple):
    """What the sums of all ranks and micro-batches of a step are divided by."""

    targets: int
    mtp_targets: list[int]  # of each depth
    sequences: int


BALANCE_LOSSES = ("balance_loss", "device_balance_loss", "communication_balance_loss")


class StepReport(NamedTuple):
    """A step's numbers over all ranks. Tensors stay on the device: reading them waits for it."""

    losses: Float64[Tensor, " 4+M"]  # means: the main loss, `BALANCE_LOSSES`, each MTP depth's
    load: Int64[Tensor, "L E"]  # choices per MoE layer and expert
    grad_norm: float
    is_applied: bool


def count_denominators(batches: list[Batch], config: ModelConfig, ranks: Ranks) -> Denominators:
    """The step's denominators: counts on the host, added over replicas there."""
    depths = range(config.mtp.depth + 1)
    targets = [sum(batch.num_targets(depth) for batch in batches) for depth in depths]
    sequences = sum(len(batch.tokens) for batch in batches)
    *targets, sequences = ranks.sum_replicas([*targets, sequences])
    return Denominators(targets[0], targets[1:], sequences)


def objective(sums: Sums, over: Denominators, config: ModelConfig) -> Tensor:
    """This micro-batch's share of the loss: the shares of a step add up to it.

    L = L_main + w * mean over depths of L_MTP + alpha * L_balance (arXiv:2412.19437, 2.1.2, 2.2)
    and, where they have weights, V2's two further balance losses (arXiv:2405.04434, 2.2.3): each
    a mean over the global batch, so that neither ranks nor accumulation enter.
    """
    loss = sums.loss / max(over.targets, 1)
    for nats, targets in zip(sums.mtp_loss, over.mtp_targets, strict=True):
        loss = loss + config.mtp.loss_weight / config.mtp.depth * nats / max(targets, 1)
    if config.moe is not None:
        loss = loss + config.moe.balance_loss_weight * sums.balance_loss / over.sequences
        if config.moe.has_group_balance_losses:
            device, communication = sums.group_balance_losses / over.sequences
            loss = loss + config.moe.device_balance_loss_weight * device
            loss = loss + config.moe.communication_balance_loss_weight * communication
    return loss


def update(
    engine: Engine, batches: list[Batch], over: Denominators, *, config: ModelConfig, lr: float
) -> StepReport:
    """Forward and backward over this rank's micro-batches, then one step of all ranks.

    The routers' biases move after an applied step, by exact counts over the global batch.
    """
    engine.model.train()
    sums = engine.accumulate(batches, lambda sums: objective(sums, over, config))
    load, balance_losses = sums.load, (sums.balance_loss[None], sums.group_balance_losses)
    totals = torch.cat((sums.loss[None], *balance_losses, sums.mtp_loss))
    with HERE.doing("sum of counts and losses"):
        dist.all_reduce(load)
        dist.all_reduce(totals)
    result = engine.step(lr)
    if result.is_applied and config.moe is not None:
        move_biases(engine, load, speed=config.moe.router.bias_update_speed)
    sequences = [over.sequences] * len(BALANCE_LOSSES)
    denominators = [over.targets, *sequences, *over.mtp_targets]
    means = totals / totals.new_tensor([max(value, 1) for value in denominators])
    return StepReport(means, load, result.grad_norm, result.is_applied)


def move_biases(engine: Engine, load: Int64[Tensor, "L E"], *, speed: float) -> None:
    """Every MoE layer's bias against its load; frozen where the router has none or speed is 0."""
    if speed == 0.0:
        return
    for row, router in engine.model.routers().items():
        if router.config.bias:
            step_bias(router.bias, load[row], speed=speed)
