"""The transformer: embedding, blocks of attention and feed-forward, head, and MTP beside it.

B batch, S sequence, D model width, V vocabulary, L MoE layers, E experts, M MTP depth.
"""

from typing import NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model.block import Block
from model.cache import Cache
from model.config import ModelConfig
from model.loss import summed_cross_entropy
from model.mtp import MTP, shift_back, shift_targets
from model.norm import RMSNorm
from model.recompute import Recompute, recomputed
from model.rope import Rotation, rotation
from model.router import Router
from model.sequences import Sequences, WholeSequences


class Sums(NamedTuple):
    """What one micro-batch adds to the step. Sums, so that the caller knows the denominator."""

    loss: Float[Tensor, ""]  # nats over the next-token targets
    mtp_loss: Float[Tensor, " M"]  # nats over the targets of each MTP depth
    balance_loss: Float[Tensor, ""]  # over sequences and MoE layers
    group_balance_losses: Float[Tensor, "2"]  # likewise: device-level, communication; 0 if unused
    load: Int64[Tensor, "L E"]  # choices per MoE layer, MTP's layers last


class Transformer(nn.Module):
    """A decoder-only language model of blocks, dense or MoE."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        expert_group: dist.ProcessGroup | None = None,
        sequences: Sequences | None = None,
        recompute: Recompute = Recompute.none,
    ) -> None:
        """Weights mean nothing yet: `model.init.initialise` or a checkpoint fills them."""
        super().__init__()
        self.config = config
        self.recompute = recompute
        sequences = sequences or WholeSequences()
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Block(
                config,
                is_dense=i < config.num_dense_layers,
                expert_group=expert_group,
                sequences=sequences,
            )
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head: nn.Linear | None = None
        if not config.tie_embedding:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            MTP(config, expert_group=expert_group, sequences=sequences)
            for _ in range(config.mtp.depth)
        )

    def forward(
        self,
        tokens: Int64[Tensor, "B T"],
        targets: Int64[Tensor, "B T"],
        positions: Int64[Tensor, "B S"],
        counted: Bool[Tensor, "B T"],
        *,
        segments: list[int],
    ) -> Sums:
        """Losses and load of a micro-batch; nothing is divided yet.

        `targets` are the next tokens, IGNORED where nothing is predicted; `counted` marks the
        tokens that are no padding; `segments` are the documents' lengths in reading order.
        T = S, or more where only a part of each sequence is here: then up to M tokens that follow
        it come along, for MTP to look ahead.
        """
        turn = self._rotation(positions)
        here = slice(positions.shape[1])
        embedded = self.embed(tokens)
        hidden = embedded[:, here]
        loads, balance_losses, group_losses = [], [], []

        def run(block: nn.Module, *inputs: Tensor, counted: Tensor) -> Tensor:
            arguments = (*inputs, turn, counted)
            out = recomputed(block, mode=self.recompute)(*arguments, segments=segments)
            if out.load is not None:
                loads.append(out.load)
                balance_losses.append(out.balance_loss)
                group_losses.append(out.group_balance_losses)
            return out.hidden

        for layer in self.layers:
            hidden = run(layer, hidden, counted=counted[:, here])
        hidden = self.norm(hidden)
        loss = summed_cross_entropy(
            hidden.flatten(0, 1), self.head_weight, targets[:, here].flatten()
        )

        mtp_losses = []
        for depth, mtp in enumerate(self.mtp, start=1):
            ahead = shift_back(embedded, depth)[:, here]
            is_real = counted & shift_back(counted, depth)
            hidden = run(mtp, hidden, ahead, counted=is_real[:, here])
            wanted = shift_targets(targets, depth)[:, here]
            mtp_losses.append(
                summed_cross_entropy(hidden.flatten(0, 1), self.head_weight, wanted.flatten())
            )
        return Sums(
            loss=loss,
            mtp_loss=torch.stack(mtp_losses) if mtp_losses else loss.new_zeros(0),
            balance_loss=sum(balance_losses, loss.new_zeros(())),
            group_balance_losses=sum(group_losses, loss.new_zeros(2)),
            load=torch.stack(loads) if loads else tokens.new_zeros(0, 0),
        )

    def decode(
        self,
        tokens: Int64[Tensor, "B S"],
        caches: list[Cache],
        *,
        padding: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """The states that the head reads at the new tokens; the caches (one per layer) grow.

        `padding` counts the tokens at the left of each row that are none.
        """
        turn, hidden_keys = self._place(tokens, caches[0].length, padding)
        hidden = self.embed(tokens)
        for layer, cache in zip(cast(list[Block], self.layers), caches, strict=True):
            hidden = layer.decode(hidden, turn, cache, hidden_keys=hidden_keys)
        return self.norm(hidden)

    def draft(
        self,
        hidden: Float[Tensor, "B S D"],
        following: Int64[Tensor, "B S"],
        cache: Cache,
        *,
        padding: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B S D"]:
        """States from which the head guesses one token further: MTP's first depth.

        `hidden` are `decode`'s states, `following` the tokens after them.
        """
        turn, hidden_keys = self._place(following, cache.length, padding)
        mtp = cast(MTP, self.mtp[0])
        return mtp.decode(hidden, self.embed(following), turn, cache, hidden_keys=hidden_keys)

    def predict(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Logits, in fp32, of the tokens after those at which the states are."""
        return F.linear(hidden, self.head_weight).float()

    def logits(self, tokens: Int64[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """All logits of whole sequences, for comparisons; training never holds them."""
        batch_size, seq_len = tokens.shape
        positions = torch.arange(seq_len, device=tokens.device).expand_as(tokens)
        turn = self._rotation(positions)
        counted = torch.ones_like(tokens, dtype=torch.bool)
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden, turn, counted, segments=[seq_len] * batch_size).hidden
        return F.linear(self.norm(hidden), self.head_weight)

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """The head's matrix: its own, or the embedding's."""
        return self.embed.weight if self.head is None else self.head.weight

    def routers(self) -> list[Router]:
        """The routers in the order of `Sums.load`."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _rotation(self, positions: Int64[Tensor, "B S"]) -> Rotation:
        return rotation(self.config.rope, positions, dim=self.config.attention.rotated_dim)

    def _place(
        self, tokens: Tensor, start: int, padding: Tensor | None
    ) -> tuple[Rotation, Bool[Tensor, "B T"] | None]:
        """Angles of tokens that follow `start` others, and which keys of all are padding."""
        places = torch.arange(start + tokens.shape[1], device=tokens.device)
        positions = places[start:].expand_as(tokens)
        if padding is None:
            return self._rotation(positions), None
        positions = (positions - padding[:, None]).clamp(min=0)
        return self._rotation(positions), places < padding[:, None]
