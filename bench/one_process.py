"""A model trained in this one process as ZeRO 0 trains it, without DeepSpeed.

BF16 weights, fp32 masters, accumulated gradients and moments, global clipping, AdamW.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.balance import step_bias
from model.config import ModelConfig
from model.products import use_fp8
from model.transformer import Transformer
from train.engine.replicated import Replicated
from train.optimizer.config import OptimizerConfig, build_optimizer, parameter_groups

OPTIMIZER = OptimizerConfig()


def make_replicated(model: nn.Module, dtype: torch.dtype) -> Replicated:
    """`model`, on its device and in fp32, under our ZeRO 0; its weights become `dtype`."""
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp()) / "store"
        dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    return Replicated(
        model,
        parameter_groups(model, OPTIMIZER),
        build=lambda groups: build_optimizer(groups, OPTIMIZER),
        dtype=dtype,
        clip_norm=OPTIMIZER.clip_norm,
        bucket_size=50_000_000,
        overlaps=False,
        expert_names=frozenset(),
        expert_group=None,
        expert_copies=None,
    )


class Trainee:
    """Our model, and a step of it on tokens [B, S + 1]."""

    def __init__(
        self, config: ModelConfig, device: torch.device, *, dtype: torch.dtype, is_fp8: bool = False
    ) -> None:
        with torch.device(device):
            self.model = Transformer(config)
        torch.manual_seed(0)
        for parameter in self.model.parameters():  # on the device: the host would take minutes
            with torch.no_grad():
                is_norm = parameter.dim() == 1
                parameter.fill_(1.0) if is_norm else parameter.normal_(std=config.init_std)
        if is_fp8:
            use_fp8(self.model)
        self._replicated = make_replicated(self.model, dtype)

    def step(self, tokens: Tensor, *, lr: float) -> Tensor:
        """Nats per token before the step."""
        config, moe = self.model.config, self.model.config.moe
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        batch_size, seq_len = inputs.shape
        sums = self.model(
            inputs,
            targets.contiguous(),
            torch.arange(seq_len, device=inputs.device).expand_as(inputs),
            torch.ones_like(inputs, dtype=torch.bool),
            segments=[seq_len] * batch_size,
        )
        loss = sums.loss / inputs.numel()
        share = loss
        if moe is not None:
            share = share + moe.balance_loss_weight * sums.balance_loss / batch_size
        self._replicated.backward(share, is_last=True)
        self._replicated.step(lr)
        if moe is not None and moe.router.bias and moe.router.bias_update_speed:
            for row, router in self.model.routers().items():
                step_bias(router.bias, sums.load[row], speed=moe.router.bias_update_speed)
        assert config.mtp.depth == 0, "its loss is left out here"
        return loss.detach()


def peer_step(
    model: nn.Module, loss_of: Callable[[], Tensor], dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A step of another model under the same masters, clipping and optimizer."""
    replicated = make_replicated(model, dtype)

    def step() -> Tensor:
        loss = loss_of()
        replicated.backward(loss, is_last=True)
        replicated.step(1e-4)
        return loss.detach()

    return step
