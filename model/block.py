"""One block: attention and a feed-forward network, each behind a norm and beside a residual.

B batch, S sequence, D model width, E experts.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model.cache import Cache
from model.config import ModelConfig
from model.ffn import SwiGLU
from model.gqa import GQA, GQAConfig
from model.halves import Steps, halve, halve_segments, in_turns
from model.mla import MLA, MLAConfig
from model.moe import MoE
from model.norm import RMSNorm
from model.recompute import rebuild
from model.rope import Rotation, softmax_temperature
from model.sequences import Sequences


class BlockOutput(NamedTuple):
    hidden: Float[Tensor, "B S D"]
    load: Int64[Tensor, " E"] | None  # None in a dense block
    balance_loss: Float[Tensor, ""] | None
    group_balance_losses: Float[Tensor, "2"] | None


class Block(nn.Module):
    """A pre-norm transformer block, dense or MoE.

    `in_halves` an MoE block computes two halves of its sequences in turns (model/halves.py).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        is_dense: bool,
        expert_group: dist.ProcessGroup | None,
        sequences: Sequences,
        in_halves: bool = False,
    ) -> None:
        super().__init__()
        self.in_halves = in_halves and not is_dense
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = build_attention(config, sequences)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn: SwiGLU | MoE
        if is_dense:
            self.ffn = SwiGLU(config.dim, config.ffn_dim)
        else:
            assert config.moe is not None, "check_model asks for it"
            self.ffn = MoE(
                config.moe,
                dim=config.dim,
                expert_group=expert_group,
                sequences=sequences,
                in_halves=in_halves,
            )

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        rotation: Rotation,
        counted: Bool[Tensor, "B S"],
        *,
        segments: list[int],
    ) -> BlockOutput:
        if not self.in_halves:
            (output,) = in_turns(self._steps(x, rotation, counted, segments))
            return output
        turns = (Rotation(*of_half) for of_half in zip(*map(halve, rotation), strict=True))
        halves = zip(halve(x), turns, halve(counted), halve_segments(segments), strict=True)
        return _join(in_turns(*(self._steps(*half) for half in halves)))

    def _steps(
        self, x: Tensor, rotation: Rotation, counted: Tensor, segments: list[int]
    ) -> Steps[BlockOutput]:
        """The block over some sequences; in halves it pauses where the MoE layer's rows travel."""
        inner = rebuild(self.attention_norm, x)
        x = x + self.attention(inner, rotation, segments=segments)
        inner = rebuild(self.ffn_norm, x)
        if isinstance(self.ffn, MoE):
            if self.in_halves:
                out = yield from self.ffn.steps(inner, counted)
            else:
                out = self.ffn(inner, counted)
            return BlockOutput(x + out.hidden, out.load, out.balance_loss, out.group_balance_losses)
        return BlockOutput(x + self.ffn(inner), None, None, None)

    def decode(
        self,
        x: Float[Tensor, "B S D"],
        rotation: Rotation,
        cache: Cache,
        *,
        hidden_keys: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B S D"]:
        """The block over new tokens only; past ones are in the cache."""
        mixed = self.attention.decode(
            self.attention_norm(x), rotation, cache, hidden_keys=hidden_keys
        )
        x = x + mixed
        inner = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            counted = inner.new_ones(inner.shape[:2], dtype=bool)
            return x + self.ffn(inner, counted).hidden
        return x + self.ffn(inner)


def _join(halves: list[BlockOutput]) -> BlockOutput:
    hidden, *others = zip(*halves, strict=True)
    return BlockOutput(torch.cat(hidden), *(torch.stack(of_both).sum(dim=0) for of_both in others))


def build_attention(config: ModelConfig, sequences: Sequences) -> MLA | GQA:
    """The attention of the model's kind."""
    temperature = softmax_temperature(config.rope)
    match config.attention:
        case MLAConfig():
            return MLA(
                config.attention,
                dim=config.dim,
                norm_eps=config.norm_eps,
                temperature=temperature,
                sequences=sequences,
            )
        case GQAConfig():
            return GQA(
                config.attention, dim=config.dim, temperature=temperature, sequences=sequences
            )
        case _:
            raise TypeError(f"no attention for {type(config.attention).__name__}")
