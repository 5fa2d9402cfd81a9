"""The model's config: the sizes of the whole; each part's config stands beside its class."""

from dataclasses import dataclass, field

from model.attention import AttentionConfig
from model.gqa import GQAConfig, check_gqa
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
    """Common to all models; the kinds differ in their attention."""

    #: Which attention: mla or gqa; set by the group's option.
    kind: str = "mla"
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
    #: Whether the head's matrix is the embedding's.
    tie_embedding: bool = False
    attention: AttentionConfig
    rope: RopeConfig = field(default_factory=RopeConfig)
    #: The MoE layers; null for a dense model.
    moe: MoEConfig | None = None
    mtp: MTPConfig = field(default_factory=MTPConfig)

    @property
    def num_moe_layers(self) -> int:
        """Blocks with experts; MTP's, which are as the last layer, come on top."""
        num_sparse = self.num_layers - self.num_dense_layers
        return num_sparse + self.mtp.depth * (num_sparse > 0)


@dataclass(slots=True, kw_only=True)
class MLAModelConfig(ModelConfig):
    """DeepSeek-V2 and after: latent attention."""

    kind: str = "mla"
    attention: MLAConfig


@dataclass(slots=True, kw_only=True)
class GQAModelConfig(ModelConfig):
    """DeepSeek LLM and Coder, and the R1 distillations' students: grouped-query attention."""

    kind: str = "gqa"
    attention: GQAConfig


MODEL_KINDS: dict[str, type[ModelConfig]] = {"mla": MLAModelConfig, "gqa": GQAModelConfig}


def check_model(config: ModelConfig) -> None:
    """Refuse, with a ValueError naming key, value, rule and way out, what can't be built."""
    for name in ("vocab_size", "dim", "num_layers", "ffn_dim"):
        if getattr(config, name) < 1:
            raise ValueError(f"model.{name}={getattr(config, name)} must be at least 1")
    for name in ("init_std", "norm_eps"):
        if getattr(config, name) <= 0:
            raise ValueError(f"model.{name}={getattr(config, name)} must be positive")
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
    match config.attention:
        case MLAConfig():
            check_mla(config.attention)
        case GQAConfig():
            check_gqa(config.attention)
    check_rope(config.rope)
    if config.moe is not None:
        check_moe(config.moe)
    elif config.num_dense_layers < config.num_layers:
        raise ValueError(
            f"model.moe=null, but only model.num_dense_layers={config.num_dense_layers} of "
            f"model.num_layers={config.num_layers} are dense; set num_dense_layers to "
            f"{config.num_layers}, or give model.moe"
        )
