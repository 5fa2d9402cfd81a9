"""Multi-token prediction (arXiv:2412.19437, 2.2): further depths that predict further ahead.

B batch, S sequence, D model width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model.block import Block, BlockOutput
from model.cache import Cache
from model.config import ModelConfig
from model.linear import Linear
from model.loss import IGNORED
from model.norm import RMSNorm
from model.recompute import rebuild
from model.rope import Rotation
from model.sequences import Sequences


class MTP(nn.Module):
    """One depth: a block over the previous depth's state and the next known token.

    Embedding and head are the main model's. The state continued from is the one that the
    previous depth's head read (after its norm), and the embedding comes first in the
    projection's input: both as in the published weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        expert_group: dist.ProcessGroup | None,
        sequences: Sequences,
        in_halves: bool = False,
    ) -> None:
        super().__init__()
        self.embed_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.hidden_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.project = Linear(2 * config.dim, config.dim)
        is_dense = config.num_dense_layers == config.num_layers
        self.block = Block(
            config,
            is_dense=is_dense,
            expert_group=expert_group,
            sequences=sequences,
            in_halves=in_halves,
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self,
        hidden: Float[Tensor, "B S D"],
        ahead: Float[Tensor, "B S D"],
        rotation: Rotation,
        counted: Bool[Tensor, "B S"],
        *,
        segments: list[int],
    ) -> BlockOutput:
        """The normed state that head and next depth read; `ahead` are the embeddings of the
        tokens `depth` places later."""
        out = self.block(self._join(hidden, ahead), rotation, counted, segments=segments)
        return out._replace(hidden=self.norm(out.hidden))

    def decode(
        self,
        hidden: Float[Tensor, "B S D"],
        ahead: Float[Tensor, "B S D"],
        rotation: Rotation,
        cache: Cache,
        *,
        hidden_keys: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B S D"]:
        """The same over new tokens only; past ones are in the cache."""
        joined = self._join(hidden, ahead)
        return self.norm(self.block.decode(joined, rotation, cache, hidden_keys=hidden_keys))

    def _join(self, hidden: Tensor, ahead: Tensor) -> Tensor:
        return self.project(rebuild(self._norm_both, hidden, ahead))

    def _norm_both(self, hidden: Tensor, ahead: Tensor) -> Tensor:
        return torch.cat((self.embed_norm(ahead), self.hidden_norm(hidden)), dim=-1)


def shift_back(x: Tensor, depth: int) -> Tensor:
    """`x[:, t + depth]` at place t [B, S, ...]; zeros where the row has ended."""
    padding = (0, 0) * (x.ndim - 2) + (0, depth)
    return F.pad(x[:, depth:], padding)


def shift_targets(targets: Int64[Tensor, "B S"], depth: int) -> Int64[Tensor, "B S"]:
    """Targets `depth` places further; IGNORED past the row's end and past any IGNORED between.

    A chain of targets without a gap lies in one document, so no depth predicts across a border.
    """
    shifted = targets
    for _ in range(depth):
        following = F.pad(shifted[:, 1:], (0, 1), value=IGNORED)
        shifted = following.where(targets != IGNORED, IGNORED)
    return shifted
