"""The transformer: embedding, blocks of attention and feed-forward, head, and MTP beside it.

B batch, S sequence, D model width, V vocabulary, L MoE layers, E experts, M MTP depth.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model.block import Block, BlockOutput
from model.cache import Cache
from model.config import ModelConfig
from model.loss import summed_cross_entropy
from model.moe import MoE
from model.mtp import MTP, shift_back, shift_targets
from model.norm import RMSNorm
from model.offload import Stash
from model.part import Part, whole
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

    def detached(self) -> "Sums":
        """The same without gradients, in fp64, to add up those of many micro-batches."""
        return Sums(*(x.detach() if x.dtype == torch.int64 else x.detach().double() for x in self))

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(one + another for one, another in zip(self, other, strict=True)))


class MicroBatch(NamedTuple):
    """What the model is given of some sequences.

    T = S, or more where only a part of each sequence is here: then up to M tokens that follow it
    come along, for MTP to look ahead.
    """

    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]  # the next tokens, IGNORED where nothing is predicted
    positions: Int64[Tensor, "B S"]
    counted: Bool[Tensor, "B T"]  # False at padding
    segments: list[int]  # the documents' lengths in reading order


class Advanced(NamedTuple):
    """What a part of the model makes of a micro-batch."""

    hidden: Float[Tensor, "B S D"]  # that the next part continues from
    sums: Sums  # of this part alone; zero where other parts have a loss or a load


class Transformer(nn.Module):
    """A decoder-only language model of blocks, dense or MoE.

    In a pipeline it holds the `parts` of one rank; blocks keep their names and indices.
    """

    embed: nn.Embedding  # None in parts that need none, as norm
    norm: RMSNorm

    def __init__(
        self,
        config: ModelConfig,
        *,
        expert_group: dist.ProcessGroup | None = None,
        sequences: Sequences | None = None,
        recompute: Recompute = Recompute.none,
        offloads: bool = False,
        in_halves: bool = False,
        parts: Sequence[Part] | None = None,
    ) -> None:
        """Weights mean nothing yet: `model.init.initialise` or a checkpoint fills them."""
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.offloads = offloads  # what blocks keep for the backward pass
        self.parts = list(parts or [whole(config)])
        sequences = sequences or WholeSequences()
        has_end = any(part.is_last for part in self.parts)
        is_embedding_read_again = has_end and (config.tie_embedding or config.mtp.depth > 0)
        has_embedding = is_embedding_read_again or any(part.is_first for part in self.parts)
        self.register_module(
            "embed", nn.Embedding(config.vocab_size, config.dim) if has_embedding else None
        )
        held = {i for part in self.parts for i in part.layers}
        self.layers = nn.ModuleList(
            Block(
                config,
                is_dense=i < config.num_dense_layers,
                expert_group=expert_group,
                sequences=sequences,
                in_halves=in_halves,
            )
            if i in held
            else nn.Identity()  # on another rank; keeps the others' names
            for i in range(config.num_layers)
        )
        self.register_module("norm", RMSNorm(config.dim, eps=config.norm_eps) if has_end else None)
        self.head: nn.Linear | None = None
        if has_end and not config.tie_embedding:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            MTP(config, expert_group=expert_group, sequences=sequences, in_halves=in_halves)
            for _ in range(config.mtp.depth if has_end else 0)
        )
        for name, module in self.named_modules():
            if isinstance(module, MoE):
                module.dispatcher.place = name

    def forward(
        self,
        tokens: Int64[Tensor, "B T"],
        targets: Int64[Tensor, "B T"],
        positions: Int64[Tensor, "B S"],
        counted: Bool[Tensor, "B T"],
        *,
        segments: list[int],
    ) -> Sums:
        """Losses and load of a micro-batch; nothing is divided yet. See `MicroBatch`."""
        (part,) = self.parts
        batch = MicroBatch(tokens, targets, positions, counted, segments)
        return self.advance(part, None, batch).sums

    def advance(
        self, part: Part, hidden: Float[Tensor, "B S D"] | None, batch: MicroBatch
    ) -> Advanced:
        """One part's blocks, and after the last the losses; `hidden` is None before the first."""
        length = batch.positions.shape[1]
        turn, segments = self._rotation(batch.positions), batch.segments
        embedded = self.embed(batch.tokens) if part.is_first or len(self.mtp) else None
        if hidden is None:
            assert embedded is not None, "the first part has the embedding"
            hidden = embedded[:, :length]
        tally = _Tally(self.config, device=hidden.device)
        stash = Stash() if self.offloads else None
        run = partial(self._run, segments=segments, stash=stash)
        counted = batch.counted[:, :length]
        for i in part.layers:
            hidden = tally.add(i, run(self.layers[i], hidden, turn, counted))
        if not part.is_last:
            if stash is not None:
                stash.depart()  # other micro-batches come before this one's backward pass
            return Advanced(hidden, tally.sums())

        hidden = self.norm(hidden)
        tally.losses.append(self._loss(hidden, batch.targets[:, :length]))
        for depth, mtp in enumerate(self.mtp, start=1):
            assert embedded is not None, "a part with MTP has the embedding"
            ahead = shift_back(embedded, depth)[:, :length]
            counted = (batch.counted & shift_back(batch.counted, depth))[:, :length]
            out = run(mtp, hidden, ahead, turn, counted)
            hidden = tally.add(self.config.num_layers + depth - 1, out)
            wanted = shift_targets(batch.targets, depth)[:, :length]
            tally.losses.append(self._loss(hidden, wanted))
        return Advanced(hidden, tally.sums())

    def _run(
        self, block: nn.Module, *inputs: Any, segments: list[int], stash: Stash | None
    ) -> BlockOutput:
        with nullcontext() if stash is None else stash.keeping():
            output: BlockOutput = recomputed(block, mode=self.recompute)(*inputs, segments=segments)
        return output

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return summed_cross_entropy(hidden.flatten(0, 1), self.head_weight, targets.flatten())

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
    def has_copied_embedding(self) -> bool:
        """Whether the embedding here belongs to another rank, which has the first part."""
        return self.embed is not None and not any(part.is_first for part in self.parts)

    @property
    def reads_embedding_in_chain(self) -> bool:
        """Whether, after the last block, a state made with the embedding meets it again.

        Its gradient can't be put off apart from those in between then: torch 2.13's
        `stage_backward_weight` would free on the way what the others need.
        """
        reads = self.config.mtp.depth * (1 + self.config.tie_embedding)
        return reads > 1

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """The head's matrix: its own, or the embedding's."""
        return self.embed.weight if self.head is None else self.head.weight

    def modules_of(self, part: Part) -> list[nn.Module]:
        """The modules whose parameters a part uses."""
        ends: list[nn.Module] = (
            [self.embed] if part.is_first or (part.is_last and self.embed is not None) else []
        )
        if part.is_last:
            ends += [self.norm, *([self.head] if self.head is not None else []), *self.mtp]
        return [*(self.layers[i] for i in part.layers), *ends]

    def routers(self) -> dict[int, Router]:
        """The routers that are here, by their rows in `Sums.load`."""
        blocks = [*self.layers, *(cast(MTP, mtp).block for mtp in self.mtp)]
        return {
            i - self.config.num_dense_layers: block.ffn.router
            for i, block in enumerate(blocks)
            if isinstance(block, Block) and isinstance(block.ffn, MoE)
        }

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


class _Tally:
    """Losses and load of a pass through blocks, as they come."""

    def __init__(self, config: ModelConfig, *, device: torch.device) -> None:
        self.config = config
        self.losses: list[Tensor] = []  # main and MTP's, where the last block is
        rows = config.num_moe_layers
        columns = config.moe.num_experts if config.moe and rows else 0
        self.load = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        self.balance_loss = torch.zeros((), device=device)
        self.group_balance_losses = torch.zeros(2, device=device)

    def add(self, layer: int, output: BlockOutput) -> Tensor:
        """The block's state; MTP's blocks count on after the layers."""
        if output.load is not None:
            assert output.balance_loss is not None
            assert output.group_balance_losses is not None
            self.load[layer - self.config.num_dense_layers] = output.load
            self.balance_loss = self.balance_loss + output.balance_loss
            self.group_balance_losses = self.group_balance_losses + output.group_balance_losses
        return output.hidden

    def sums(self) -> Sums:
        none = [torch.zeros((), device=self.load.device)] * (1 + self.config.mtp.depth)
        loss, *mtp_losses = self.losses or none
        return Sums(
            loss=loss,
            mtp_loss=torch.stack(mtp_losses) if mtp_losses else loss.new_zeros(0),
            balance_loss=self.balance_loss,
            group_balance_losses=self.group_balance_losses,
            load=self.load,
        )
