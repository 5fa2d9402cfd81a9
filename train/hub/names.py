"""Our tensors under the names that they have on the Hugging Face hub: one table for all families.

Ours is one stack per layer where the hub has one tensor per expert. MTP's depth d is stored as a
further layer, `model.layers.{num_layers + d}`, with copies of the embedding and the head.
"""

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.mla import MLAConfig
from model.transformer import Transformer


class Family(StrEnum):
    """Architectures as config.json's `model_type` calls them."""

    deepseek_v2 = "deepseek_v2"
    deepseek_v3 = "deepseek_v3"
    llama = "llama"
    qwen2 = "qwen2"


# Of the model, of each block (MTP's too), and of an MTP depth around its block. An entry names a
# module, whose `weight` and `bias` keep these names, or a single tensor.
MODEL = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q_down": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.q_up": "self_attn.q_b_proj",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up": "self_attn.kv_b_proj",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.router.weight": "mlp.gate.weight",
    "ffn.router.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared.gate": "mlp.shared_experts.gate_proj",
    "ffn.shared.up": "mlp.shared_experts.up_proj",
    "ffn.shared.down": "mlp.shared_experts.down_proj",
    "ffn.experts.gate": "mlp.experts.{expert}.gate_proj.weight",
    "ffn.experts.up": "mlp.experts.{expert}.up_proj.weight",
    "ffn.experts.down": "mlp.experts.{expert}.down_proj.weight",
}
# Without compression the one query projection has its plain name.
UNCOMPRESSED = {"attention.q_up": "self_attn.q_proj"}
MTP = {
    "embed_norm": "enorm",
    "hidden_norm": "hnorm",
    "project": "eh_proj",
    "norm": "shared_head.norm",
}
MTP_COPIES = {"embed": "embed_tokens.weight", "head": "shared_head.head.weight"}

# Matrices that the published FP8 weights hold in FP8; the rest is BF16, the bias fp32.
QUANTISED = re.compile(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")


class HubTensor(NamedTuple):
    """A tensor of the hub's, and which part of which logical tensor of ours it is."""

    name: str
    shape: tuple[int, ...]
    source: str  # as in a checkpoint: weight/... or buffer/...
    start: int  # place of its first element in the source
    is_copy: bool = False  # another tensor of the folder is the same

    @property
    def is_quantised(self) -> bool:
        """Whether an FP8 folder holds it in FP8."""
        return QUANTISED.search(self.name) is not None

    @property
    def is_bias(self) -> bool:
        """Whether it is a router's bias, which no folder may round."""
        return self.source.startswith("buffer/")


def hub_tensors(config: ModelConfig, family: Family) -> list[HubTensor]:
    """All tensors of the model's hub folder, in the order of the model; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(config)
    parameters = dict(model.named_parameters())
    tensors: list[HubTensor] = []
    for name, tensor in model.state_dict().items():
        if name not in parameters and family is not Family.deepseek_v3:
            continue  # the bias, which there is zero and unused
        source = f"{'weight' if name in parameters else 'buffer'}/{name}"
        hub_name = to_hub_name(name, config)
        if "{expert}" in hub_name:
            shape = tensor.shape[1:]
            tensors += [
                HubTensor(hub_name.format(expert=e), tuple(shape), source, e * shape.numel())
                for e in range(len(tensor))
            ]
        else:
            tensors.append(HubTensor(hub_name, tuple(tensor.shape), source, 0))
    return [*tensors, *_mtp_copies(config)]


def to_hub_name(name: str, config: ModelConfig) -> str:
    """The hub's name of a parameter or buffer; of a stack of experts, with `{expert}` in it."""
    block = BLOCK
    if isinstance(config.attention, MLAConfig) and config.attention.q_lora_rank is None:
        block = BLOCK | UNCOMPRESSED
    first, _, rest = name.partition(".")
    if first not in ("layers", "mtp"):
        return _look_up(name, MODEL)
    index, _, rest = rest.partition(".")
    if first == "layers":
        return f"model.layers.{index}.{_look_up(rest, block)}"
    layer = f"model.layers.{config.num_layers + int(index)}"
    if rest.startswith("block."):
        return f"{layer}.{_look_up(rest.removeprefix('block.'), block)}"
    return f"{layer}.{_look_up(rest, MTP)}"


def _look_up(name: str, table: dict[str, str]) -> str:
    if name in table:
        return table[name]
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}"


def _mtp_copies(config: ModelConfig) -> Iterator[HubTensor]:
    head = "embed" if config.tie_embedding else "head"
    shape = (config.vocab_size, config.dim)
    for depth in range(config.mtp.depth):
        layer = f"model.layers.{config.num_layers + depth}"
        for source, name in (("embed", MTP_COPIES["embed"]), (head, MTP_COPIES["head"])):
            yield HubTensor(f"{layer}.{name}", shape, f"weight/{source}.weight", 0, is_copy=True)
