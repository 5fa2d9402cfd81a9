"""What activations take, in formulas: the tests count bytes and hold these to them.

D model width, H heads, K a head's query and key, V its value, C and Q the latents of key-value and
query, R a head's part with position, F an inner width, E experts, k experts per token.
"""

from model.attention import AttentionConfig
from model.config import ModelConfig
from model.gqa import GQAConfig
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.recompute import Recompute


def kept_per_token(config: ModelConfig, *, is_dense: bool, recompute: Recompute) -> int:
    """Elements that a block keeps for the backward pass, for each token, its input included.

    As counted in fp32 on a CPU, where integers of routing are two elements each and an MLA value is
    padded to the key's width; without what is there once per sequence. All experts are on this
    rank.
    """
    if recompute is Recompute.full:
        return config.dim
    is_all_kept = recompute is Recompute.none
    norms = 2 * (config.dim + 1) if is_all_kept else 0  # results, and what they were divided by
    residuals = 2 * config.dim
    attention = _attention(config.attention, is_all_kept=is_all_kept)
    if is_dense:
        return residuals + norms + attention + _swiglu(config.ffn_dim, is_all_kept=is_all_kept)
    assert config.moe is not None, "check_model asks for it"
    return residuals + norms + attention + _moe(config.moe, config.dim, is_all_kept=is_all_kept)


def routed_peak(
    config: MoEConfig, *, dim: int, tokens: int, num_local: int, is_fused: bool = False
) -> int:
    """Elements that one MoE layer's router and routed experts take at once, forward or backward.

    At most, on any rank, for any routing, as long as `max_tokens_per_chunk` bounds the rows that
    the rank's `num_local` experts take at once; `tokens` are this rank's own. Integers count as two
    elements, as in fp32. `is_fused`: the experts run as grouped products (GPUs, BF16), whose
    backward holds SwiGLU's result and one factor's gradient more; not measured yet.
    """
    assert config.max_tokens_per_chunk is not None, "without it there is no bound"
    # Of its own rows a rank holds: what it sends, what comes back, and the gradient of either.
    own = tokens * (3 * config.top_k * dim + 2 * dim + 3 * config.num_experts + 10 * config.top_k)
    # Of a chunk's: rows and both gradients; gate, up, and what leads back through them.
    per_row = 3 * dim + (7 if is_fused else 5) * config.expert_dim + 8
    # Gradients of weights: of the chunks so far, of this one, and their sum.
    weights = 3 * num_local * 3 * dim * config.expert_dim
    return own + config.max_tokens_per_chunk * per_row + weights


def _attention(config: AttentionConfig, *, is_all_kept: bool) -> int:
    heads = config.num_heads
    if isinstance(config, GQAConfig):  # queries, keys and values come from products of full width
        return 2 * heads * config.head_dim + 2 * config.num_kv_heads * config.head_dim + heads
    assert isinstance(config, MLAConfig), "the kinds are two"
    width = config.nope_head_dim + config.rope_head_dim
    down = (config.q_lora_rank or 0) + config.kv_lora_rank + config.rope_head_dim
    mixed = heads * (width + 1)  # the result of attention and its normaliser
    if width != config.v_head_dim:
        mixed += heads * config.v_head_dim  # the same without padding
    if not is_all_kept:
        return down + mixed
    latents = config.kv_lora_rank + 1 + (config.q_lora_rank + 1 if config.q_lora_rank else 0)
    turns = 2 * config.rope_head_dim
    return down + mixed + latents + turns + 3 * heads * width


def _swiglu(inner_dim: int, *, is_all_kept: bool) -> int:
    return (4 if is_all_kept else 2) * inner_dim


def _moe(config: MoEConfig, dim: int, *, is_all_kept: bool) -> int:
    routing = config.num_experts + 6 * config.top_k + 3
    outputs = config.top_k * dim
    shared = _swiglu(config.num_shared_experts * config.expert_dim, is_all_kept=is_all_kept)
    inside = config.top_k * (dim + 2 * config.expert_dim) if is_all_kept else 0
    return routing + outputs + shared + inside
