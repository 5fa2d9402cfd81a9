"""The model's config: the sizes of the whole; each part's config stands beside its class."""

from dataclasses import dataclass, field

from model.mla import MLAConfig, check_mla
from model.moe import MoEConfig, check_moe
from model.rope import RopeConfig, check_rope


@dataclass(slots=True, kw_only=True)
class MTPConfig:
    #: Further tokens predicted at each position; 0 turns MTP off.
    depth: int = 0
    #: Weight of the mean of the depths' losses.
    loss_weight: float = 0.3


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    #: Entries of the vocabulary; at least as many as the tokenizer has.
    vocab_size: int
    #: Width of the hidden state.
    dim: int
    #: Blocks, MTP's not counted.
    num_layers: int
    #: How many of the first blocks have a dense feed-forward network instead of experts.
    num_dense_layers: int = 1
    #: Inner width of the dense feed-forward networks.
    ffn_dim: int
    #: Added to the mean square before its root.
    norm_eps: float = 1e-6
    #: Standard deviation of the initial weights.
    init_std: float = 0.006
    attention: MLAConfig
    rope: RopeConfig = field(default_factory=RopeConfig)
    moe: MoEConfig
    mtp: MTPConfig = field(default_factory=MTPConfig)


def check_model(config: ModelConfig) -> None:
    """Refuse, with a ValueError naming key, value, rule and way out, what can't be built."""
    for name in ("vocab_size", "dim", "num_layers", "ffn_dim"):
        if getattr(config, name) < 1:
            raise ValueError(f"model.{name}={getattr(config, name)} must be at least 1")
    if not 0 <= config.num_dense_layers <= config.num_layers:
        raise ValueError(
            f"model.num_dense_layers={config.num_dense_layers} must lie between 0 and "
            f"model.num_layers={config.num_layers}"
        )
    if config.mtp.depth < 0 or config.mtp.loss_weight < 0:
        raise ValueError(
            f"model.mtp.depth={config.mtp.depth} and model.mtp.loss_weight="
            f"{config.mtp.loss_weight} must not be negative; depth 0 turns MTP off"
        )
    check_mla(config.attention)
    check_rope(config.rope, dim=config.attention.rope_head_dim)
    check_moe(config.moe)
