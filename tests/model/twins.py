"""A model of transformers' and ours with the same weights; names and config by import's tables."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from model.cache import Cache
from model.config import check_model
from model.transformer import Transformer
from train.hub.config import HubConfig, from_hub_config
from train.hub.names import to_hub_name

TOLERANCE = 1e-5  # of a tensor's largest entry
ROUNDING = 1e-4  # a key's bias that RoPE hardly turns moves no softmax: its gradient is rounding


class Twins(NamedTuple):
    theirs: Any
    ours: Transformer


def build_twins(config: PretrainedConfig, *, seed: int = 0) -> Twins:
    """Their model with random weights (biases and norms too), ours with the same."""
    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if "norm" in name or "bias" in name:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    our_config = from_hub_config(HubConfig(config.to_dict()), mtp_depth=0)
    check_model(our_config)
    ours = Transformer(our_config)
    ours.load_state_dict(translate(theirs.state_dict(), ours))
    return Twins(theirs, ours)


def translate(tensors: Mapping[str, Tensor], ours: Transformer) -> dict[str, Tensor]:
    """Their weights, or their weights' gradients, under our names.

    In memory transformers keeps a layer's experts in stacks, gate and up in one; V2's routers have
    no bias there, and here one of zeros.
    """
    translated = {}
    for name, tensor in ours.state_dict().items():
        theirs = to_hub_name(name, ours.config)
        stack, is_stack, part = theirs.partition(".{expert}.")
        if is_stack:
            gate_up = tensors[f"{stack}.gate_up_proj"].chunk(2, dim=1)
            down = tensors[f"{stack}.down_proj"]
            parts = {"gate_proj.weight": gate_up[0], "up_proj.weight": gate_up[1]}
            translated[name] = (parts | {"down_proj.weight": down})[part]
        elif theirs in tensors:
            translated[name] = tensors[theirs]
        elif name.endswith("router.bias"):
            translated[name] = torch.zeros_like(tensor)
    return translated


def assert_parity(twins: Twins, tokens: Tensor, targets: Tensor) -> None:
    """Logits, loss and every gradient of ours are theirs; so is the count of parameters."""
    theirs, ours = twins
    seq_len = tokens.shape[1]
    logits = theirs(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    with torch.no_grad():
        assert_close(ours.logits(tokens), logits, "logits")
    positions = torch.arange(seq_len).expand_as(tokens)
    is_real = torch.ones_like(tokens, dtype=torch.bool)
    sums = ours(tokens, targets, positions, is_real, segments=[seq_len] * len(tokens))
    sums.loss.backward()
    assert_close(sums.loss, loss, "loss")
    if ours.config.moe is not None:
        assert sums.load.sum() == tokens.numel() * ours.config.moe.top_k * len(sums.load)

    parameters = dict(theirs.named_parameters())
    assert _count(parameters) == _count(dict(ours.named_parameters()))
    grads = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in parameters.items()
    }
    wanted = translate(grads, ours)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("key.bias") and wanted[name].abs().max() < ROUNDING:
            assert parameter.grad.abs().max() < 2 * ROUNDING
        else:
            assert_close(parameter.grad, wanted[name], name)


@torch.no_grad()
def assert_decoding_equals(twins: Twins, tokens: Tensor, *, steps: list[int]) -> None:
    """Our logits from the cache, over the tokens in these steps, are theirs of a full pass."""
    theirs, ours = twins
    caches = [Cache(capacity=tokens.shape[1]) for _ in ours.layers]
    states = [ours.decode(new, caches) for new in tokens.split(steps, dim=1)]
    assert_close(ours.predict(torch.cat(states, dim=1)), theirs(tokens).logits, "decoded")


def assert_close(actual: Tensor, wanted: Tensor, name: str) -> None:
    largest = wanted.abs().max().clamp(min=1e-20)
    difference = ((actual - wanted).abs().max() / largest).item()
    assert difference <= TOLERANCE, f"{name} differs by {difference:.1e} of its largest entry"


def _count(parameters: Mapping[str, Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())
