"""A run small enough for a test: model, config, and batches out of a seeded generator."""

import email
from pathlib import Path
from typing import Any

import torch

from data.batches import Batch
from data.config import FilesData
from data.samples import IGNORED
from data.tokenizer import TokenizerConfig
from model.config import MLAModelConfig, ModelConfig, MTPConfig
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.router import RouterConfig
from train.checkpoint.checkpoints import CheckpointConfig
from train.config import RunConfig
from train.evaluation import EvaluationConfig
from train.journal import LoggingConfig
from train.layout.parallel import ParallelConfig
from train.schedule import ConstantSchedule

SEQ_LEN = 16


def tiny_model(**changes: Any) -> ModelConfig:
    """Three layers, one of them dense, eight experts, one depth of MTP."""
    values: dict[str, Any] = {
        "vocab_size": 512,
        "dim": 32,
        "num_layers": 3,
        "ffn_dim": 48,
        "init_std": 0.05,
        "attention": tiny_attention(),
        "moe": tiny_moe(),
        "mtp": MTPConfig(depth=1),
    }
    return MLAModelConfig(**values | changes)


def tiny_attention(*, num_heads: int = 2) -> MLAConfig:
    return MLAConfig(
        num_heads=num_heads,
        q_lora_rank=16,
        kv_lora_rank=16,
        nope_head_dim=8,
        rope_head_dim=4,
        v_head_dim=8,
    )


def tiny_moe(**changes: Any) -> MoEConfig:
    values: dict[str, Any] = {
        "num_experts": 8,
        "top_k": 2,
        "expert_dim": 16,
        "balance_loss_weight": 0.01,
        "router": RouterConfig(bias_update_speed=0.01),
    }
    return MoEConfig(**values | changes)


def moe_with_all_losses() -> MoEConfig:
    """V2's device-level and communication losses beside the sequence-wise one."""
    return tiny_moe(
        device_balance_loss_weight=0.05,
        communication_balance_loss_weight=0.02,
        router=RouterConfig(num_groups=4, top_groups=2, bias_update_speed=0.01),
    )


def tiny_run(folder: Path, **changes: Any) -> RunConfig:
    """A run over a package of the standard library, eight sequences a step, logged at each step."""
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": tiny_model(),
        "data": FilesData(
            folder=str(folder / "corpus"),
            # Not our own source: with every edit of it other gradients would be nearly zero, where
            # AdamW makes roundings large (test_roundings.py).
            paths=[str(Path(email.__file__).parent / "*.py")],
            validation_fraction=0.3,
            seq_len=SEQ_LEN,
            tokenizer=TokenizerConfig(vocab_size=512),
            processes=1,
        ),
        "schedule": ConstantSchedule(steps=6, batch_size=8, peak_lr=1e-2),
        "parallel": ParallelConfig(micro_batch_size=4),
        "checkpoint": CheckpointConfig(every=2, keep=10),
        "evaluation": EvaluationConfig(every=6, max_sequences=8),
        "logging": LoggingConfig(every=1),
    }
    return RunConfig(**values | changes)


def random_batches(
    step: int, *, rank: int, num_ranks: int, micro_batch_size: int, batch_size: int = 8
) -> list[Batch]:
    """One rank's share of a global batch that depends on the step alone, with gaps and padding."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 512, (batch_size, SEQ_LEN + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[:3, 5] = IGNORED  # borders of documents

    def documents(row: int) -> list[int]:
        return [6, SEQ_LEN - 6] if row < 3 else [SEQ_LEN]

    is_real = torch.ones_like(targets, dtype=torch.bool)
    is_real[-1, 10:] = False  # padding, in the last rank's last micro-batch
    targets[~is_real] = IGNORED
    positions = torch.arange(SEQ_LEN).expand_as(targets)
    mine = range(rank * micro_batch_size, batch_size, num_ranks * micro_batch_size)
    return [
        Batch(
            tokens[i : i + micro_batch_size, :-1],
            targets[i : i + micro_batch_size],
            positions[i : i + micro_batch_size],
            is_real[i : i + micro_batch_size],
            [length for row in range(i, i + micro_batch_size) for length in documents(row)],
        )
        for i in range(mine.start, mine.stop, mine.step)
    ]
