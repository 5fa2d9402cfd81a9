"""The transformer: embedding, blocks of attention and feed-forward, head, and MTP beside it.

B batch, S sequence, D model width, V vocabulary, L MoE layers, E experts, M MTP depth.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.cache import LatentCache
from model.config import ModelConfig
from model.loss import summed_cross_entropy
from model.mtp import MTP, shift_back, shift_targets
from model.rope import rotation
from model.router import Router


class Sums(NamedTuple):
    """What one micro-batch adds to the step. Sums, so that the caller knows the denominator."""

    loss: Float[Tensor, ""]  # nats over the next-token targets
    mtp_loss: Float[Tensor, " M"]  # nats over the targets of each MTP depth
    balance_loss: Float[Tensor, ""]  # over sequences and MoE layers
    load: Int64[Tensor, "L E"]  # choices per MoE layer, MTP's layers last


class Transformer(nn.Module):
    """A DeepSeek-V3-shaped language model. The head is not tied to the embedding."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        expert_group: dist.ProcessGroup | None = None,
        recompute: bool = False,
    ) -> None:
        """Weights are left empty: `model.init.initialise` or a checkpoint fills them."""
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Block(config, is_dense=i < config.num_dense_layers, expert_group=expert_group)
            for i in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            MTP(config, expert_group=expert_group) for _ in range(config.mtp.depth)
        )

    def forward(
        self,
        tokens: Int64[Tensor, "B S"],
        targets: Int64[Tensor, "B S"],
        positions: Int64[Tensor, "B S"],
        counted: Bool[Tensor, "B S"],
        *,
        segments: list[int],
    ) -> Sums:
        """Losses and load of a micro-batch; nothing is divided yet.

        `targets` are the next tokens, IGNORED where nothing is predicted; `counted` marks the
        tokens that are no padding; `segments` are the documents' lengths in reading order.
        """
        turn = rotation(self.config.rope, positions, dim=self.config.attention.rope_head_dim)
        embedded = self.embed(tokens)
        hidden = embedded
        loads, balance_losses = [], []

        def run(block: nn.Module, *inputs: Tensor, counted: Tensor) -> Tensor:
            arguments = (*inputs, turn, counted)
            if self.recompute and torch.is_grad_enabled():
                out = checkpoint(block, *arguments, segments=segments, use_reentrant=False)
            else:
                out = block(*arguments, segments=segments)
            if out.load is not None:
                loads.append(out.load)
                balance_losses.append(out.balance_loss)
            return out.hidden

        for layer in self.layers:
            hidden = run(layer, hidden, counted=counted)
        hidden = self.norm(hidden)
        loss = summed_cross_entropy(hidden.flatten(0, 1), self.head.weight, targets.flatten())

        mtp_losses = []
        for depth, mtp in enumerate(self.mtp, start=1):
            ahead = shift_back(embedded, depth)
            is_real = counted & shift_back(counted, depth)
            hidden = run(mtp, hidden, ahead, counted=is_real)
            wanted = shift_targets(targets, depth)
            mtp_losses.append(
                summed_cross_entropy(hidden.flatten(0, 1), self.head.weight, wanted.flatten())
            )
        return Sums(
            loss=loss,
            mtp_loss=torch.stack(mtp_losses) if mtp_losses else loss.new_zeros(0),
            balance_loss=sum(balance_losses, loss.new_zeros(())),
            load=torch.stack(loads) if loads else tokens.new_zeros(0, self.config.moe.num_experts),
        )

    def decode(
        self, tokens: Int64[Tensor, "B S"], caches: list[LatentCache]
    ) -> Float[Tensor, "B V"]:
        """Logits, in fp32, of the token after the last one; the caches (one per layer) grow."""
        start = caches[0].length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        turn = rotation(
            self.config.rope,
            positions.expand_as(tokens),
            dim=self.config.attention.rope_head_dim,
        )
        hidden = self.embed(tokens)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer.decode(hidden, turn, cache)
        return self.head(self.norm(hidden[:, -1])).float()

    def logits(self, tokens: Int64[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """All logits of whole sequences, for comparisons; training never holds them."""
        batch_size, seq_len = tokens.shape
        positions = torch.arange(seq_len, device=tokens.device).expand_as(tokens)
        turn = rotation(self.config.rope, positions, dim=self.config.attention.rope_head_dim)
        counted = torch.ones_like(tokens, dtype=torch.bool)
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden, turn, counted, segments=[seq_len] * batch_size).hidden
        return self.head(self.norm(hidden))

    def routers(self) -> list[Router]:
        """The routers in the order of `Sums.load`."""
        return [module for module in self.modules() if isinstance(module, Router)]
