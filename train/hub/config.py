"""config.json of a Hugging Face folder and our model config, each from the other.

What the hub's model classes can't compute is refused before a byte is written, and what a
config.json asks for that doesn't exist here before a byte is read.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from data.atomic_file import read_json
from model.config import GQAModelConfig, MLAModelConfig, ModelConfig, MTPConfig
from model.gqa import GQAConfig
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.router import GroupScore, RouterConfig, Score
from train.hub.fp8_blocks import BLOCK
from train.hub.names import Family
from train.hub.rope import from_hub_rope, to_hub_rope

FILE = "config.json"
ARCHITECTURES = {
    Family.deepseek_v2: "DeepseekV2ForCausalLM",
    Family.deepseek_v3: "DeepseekV3ForCausalLM",
    Family.llama: "LlamaForCausalLM",
    Family.qwen2: "Qwen2ForCausalLM",
}
LATENT_NORM_EPS = 1e-6  # DeepSeek's classes norm the latents with this one, whatever rms_norm_eps

# Settings of theirs that exist here with one value only; where the key is absent it has it.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleave": (True,),
    "moe_layer_freq": (1,),
    "use_sliding_window": (False,),
}
FIXED_OF_FAMILY: dict[Family, dict[str, tuple[Any, ...]]] = {
    Family.deepseek_v2: {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
    },
    Family.deepseek_v3: {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    Family.llama: {},
    Family.qwen2: {},
}
FP8_METHOD: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


class HubConfig(dict[str, Any]):
    """The values of a config.json; a key that is asked for and missing is the folder's mistake."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{FILE} lacks {key}; complete it, or import another folder")


def read_hub_config(folder: Path) -> HubConfig:
    """The config.json of a folder.

    Raises:
        ValueError: There is none, or it is no JSON.
    """
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} holds no {FILE}; give the folder of a published model")
    return HubConfig(read_json(folder / FILE))


def family_of(config: ModelConfig) -> Family:
    """The hub's architecture that computes the same as the model.

    Raises:
        ValueError: None does; says which setting is in the way and what to do.
    """
    if isinstance(config.attention, GQAConfig):
        family = Family.qwen2 if config.attention.qkv_bias else Family.llama
        _refuse_unless(
            config.num_dense_layers == config.num_layers,
            f"model.num_dense_layers={config.num_dense_layers} leaves MoE layers, but {family} has "
            "none; export models with grouped-query attention when they are dense",
        )
        _refuse_unless(
            config.dim % config.attention.num_heads == 0,
            f"model.dim={config.dim} is not divisible by model.attention.num_heads="
            f"{config.attention.num_heads}, which transformers asks of {family}",
        )
    else:
        is_v2 = _has_experts(config) and _router(config).score is Score.softmax
        family = Family.deepseek_v2 if is_v2 else Family.deepseek_v3
        _refuse_unless(
            config.norm_eps == LATENT_NORM_EPS,
            f"model.norm_eps={config.norm_eps} differs from {LATENT_NORM_EPS}, which {family} has "
            "for the latents' norms",
        )
        if _has_experts(config):
            _check_experts(config, family)
    if family is not Family.deepseek_v3:
        _refuse_unless(
            config.mtp.depth == 0,
            f"model.mtp.depth={config.mtp.depth} has no place in {family}; leave MTP out with "
            "mtp=false",
        )
    return family


def to_hub_config(config: ModelConfig, *, max_seq_len: int) -> dict[str, Any]:
    """config.json's description of the model; ids of tokens and number formats are not in it."""
    family = family_of(config)
    attention = config.attention
    is_latent = isinstance(attention, MLAConfig)
    rope = to_hub_rope(config.rope, is_latent=is_latent)
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family.value,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embedding,
        "max_position_embeddings": max_seq_len,
        "rope_parameters": rope,
        "use_cache": True,
    }
    values |= _old_rope(rope)
    match attention:
        case GQAConfig():
            return values | {
                "num_key_value_heads": attention.num_kv_heads,
                "head_dim": attention.head_dim,
            }
        case MLAConfig():
            values |= to_hub_latent(attention)
    values["first_k_dense_replace"] = config.num_dense_layers
    if family is Family.deepseek_v3:
        values["num_nextn_predict_layers"] = config.mtp.depth
    if _has_experts(config):
        return values | _to_hub_experts(config, family)
    values["first_k_dense_replace"] += config.mtp.depth  # MTP's block is dense too
    return values


def from_hub_config(values: HubConfig, *, mtp_depth: int) -> ModelConfig:
    """The model that a config.json describes.

    Raises:
        ValueError: It is of another family, or asks for what doesn't exist here; names the key.
    """
    known = [family.value for family in Family]
    if values["model_type"] not in known:
        raise ValueError(
            f"{FILE}: model_type={values['model_type']} does not exist here; "
            f"it must be one of {', '.join(known)}"
        )
    family = Family(values["model_type"])
    for key, allowed in (FIXED | FIXED_OF_FAMILY[family]).items():
        if key in values and values[key] not in allowed:
            raise ValueError(
                f"{FILE}: {key}={values[key]} does not exist here; a {family} model must have "
                f"{' or '.join(map(str, allowed))}"
            )
    is_latent = family in (Family.deepseek_v2, Family.deepseek_v3)
    common: dict[str, Any] = {
        "vocab_size": values["vocab_size"],
        "dim": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "ffn_dim": values["intermediate_size"],
        "norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "init_std": float(values.get("initializer_range", 0.02)),
        "tie_embedding": bool(values.get("tie_word_embeddings", False)),
        "rope": from_hub_rope(values, is_latent=is_latent),
    }
    if not is_latent:
        return _dense_model(values, common, has_bias=family is Family.qwen2)
    num_dense = min(values["first_k_dense_replace"], values["num_hidden_layers"])
    is_dense = num_dense == values["num_hidden_layers"]
    model = MLAModelConfig(
        **common,
        num_dense_layers=num_dense,
        attention=MLAConfig(
            num_heads=values["num_attention_heads"],
            q_lora_rank=values["q_lora_rank"],
            kv_lora_rank=values["kv_lora_rank"],
            nope_head_dim=values["qk_nope_head_dim"],
            rope_head_dim=values["qk_rope_head_dim"],
            v_head_dim=values["v_head_dim"],
        ),
        moe=None if is_dense else _from_hub_experts(values, family),
        mtp=MTPConfig(depth=mtp_depth),
    )
    if model.norm_eps != LATENT_NORM_EPS:
        raise ValueError(
            f"{FILE}: rms_norm_eps={model.norm_eps} differs from {LATENT_NORM_EPS}, which {family} "
            "has for the latents' norms; here all norms have one"
        )
    return model


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The same model without MTP's modules."""
    return replace(config, mtp=replace(config.mtp, depth=0))


def _dense_model(values: HubConfig, common: dict[str, Any], *, has_bias: bool) -> GQAModelConfig:
    num_heads = values["num_attention_heads"]
    return GQAModelConfig(
        **common,
        num_dense_layers=values["num_hidden_layers"],
        attention=GQAConfig(
            num_heads=num_heads,
            num_kv_heads=values.get("num_key_value_heads") or num_heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // num_heads,
            qkv_bias=has_bias,
        ),
    )


def to_hub_latent(attention: MLAConfig) -> dict[str, Any]:
    """Latent attention's sizes by the names of DeepSeek's config.json."""
    return {
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.nope_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "v_head_dim": attention.v_head_dim,
    }


def _to_hub_experts(config: ModelConfig, family: Family) -> dict[str, Any]:
    moe, router = config.moe, _router(config)
    assert moe is not None
    values: dict[str, Any] = {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_dim,
        "moe_layer_freq": 1,
        "routed_scaling_factor": router.scale,
        "norm_topk_prob": router.renormalise,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "scoring_func": router.score.value,
    }
    if family is Family.deepseek_v3:
        return values | {"topk_method": "noaux_tc"}
    is_grouped = router.num_groups > 1
    return values | {"topk_method": "group_limited_greedy" if is_grouped else "greedy"}


def _from_hub_experts(values: HubConfig, family: Family) -> MoEConfig:
    is_v3 = family is Family.deepseek_v3
    is_grouped = is_v3 or values.get("topk_method", "greedy") == "group_limited_greedy"
    return MoEConfig(
        num_experts=values["n_routed_experts"],
        top_k=values["num_experts_per_tok"],
        expert_dim=values["moe_intermediate_size"],
        num_shared_experts=values.get("n_shared_experts") or 0,
        router=RouterConfig(
            score=Score.sigmoid if is_v3 else Score.softmax,
            renormalise=is_v3 and values["norm_topk_prob"],
            scale=float(values["routed_scaling_factor"]),
            num_groups=(values.get("n_group") or 1) if is_grouped else 1,
            top_groups=(values.get("topk_group") or 1) if is_grouped else 1,
            group_score=GroupScore.top2_sum if is_v3 else GroupScore.max,
            bias=is_v3,
        ),
    )


def _check_experts(config: ModelConfig, family: Family) -> None:
    moe, router = config.moe, _router(config)
    assert moe is not None
    _refuse_unless(
        moe.num_shared_experts > 0,
        f"model.moe.num_shared_experts=0, but transformers' {family} always has shared experts",
    )
    wanted = GroupScore.top2_sum if family is Family.deepseek_v3 else GroupScore.max
    key = "model.moe.router"
    _refuse_unless(
        router.num_groups == 1 or router.group_score is wanted,
        f"{key}.group_score={router.group_score} differs from {wanted}, which {family} has "
        f"(its {key}.score={router.score})",
    )
    if family is Family.deepseek_v2:
        for name in ("bias", "renormalise"):
            _refuse_unless(
                not getattr(router, name),
                f"{key}.{name}=true does not exist in {family} (its {key}.score=softmax); "
                f"train with {key}.{name}=false, or with score=sigmoid for deepseek_v3",
            )


def _old_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The same for readers that know the old form only."""
    values = {key: value for key, value in rope.items() if key != "rope_theta"}
    old: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        old["rope_scaling"] = values | {"type": rope["rope_type"]}
    return old


def _has_experts(config: ModelConfig) -> bool:
    return config.num_dense_layers < config.num_layers


def _router(config: ModelConfig) -> RouterConfig:
    assert config.moe is not None, "check_model asks for it"
    return config.moe.router


def _refuse_unless(claim: bool, message: str) -> None:
    if not claim:
        raise ValueError(f"this model can't be exported: {message}")
