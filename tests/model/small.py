"""A model of a few thousand parameters with every part in it, and batches for it."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig, MTPConfig
from model.init import initialise
from model.loss import IGNORED
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.recompute import Recompute
from model.router import RouterConfig
from model.transformer import Transformer


def small_config(*, mtp_depth: int = 0) -> ModelConfig:
    return ModelConfig(
        vocab_size=48,
        dim=16,
        num_layers=2,
        ffn_dim=24,
        attention=MLAConfig(
            num_heads=2,
            q_lora_rank=10,
            kv_lora_rank=8,
            nope_head_dim=6,
            rope_head_dim=4,
            v_head_dim=5,
        ),
        moe=MoEConfig(num_experts=8, top_k=3, expert_dim=6, router=RouterConfig()),
        mtp=MTPConfig(depth=mtp_depth),
    )


def small_model(
    config: ModelConfig,
    *,
    recompute: Recompute = Recompute.none,
    offloads: bool = False,
    in_halves: bool = False,
    expert_group: dist.ProcessGroup | None = None,
) -> Transformer:
    """Large weights, so that nothing is nearly linear."""
    model = Transformer(
        config,
        expert_group=expert_group,
        recompute=recompute,
        offloads=offloads,
        in_halves=in_halves,
    )
    initialise(model, seed=1, std=0.4)
    return model


class Batch(NamedTuple):
    """The inputs of `Transformer.forward`."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    counted: Tensor


def packed_batch(rows: list[list[int]], *, vocab_size: int = 48, seed: int = 0) -> Batch:
    """Rows of documents of the given lengths; each document starts at position 0 and predicts
    nothing with its last token."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), sum(rows[0]))
    tokens = torch.randint(vocab_size, shape, generator=generator)
    targets = tokens.roll(-1, dims=1)
    positions = torch.empty_like(tokens)
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            targets[row, start + length - 1] = IGNORED
            positions[row, start : start + length] = torch.arange(length)
            start += length
    return Batch(tokens, targets, positions, torch.ones_like(tokens, dtype=torch.bool))
