"""`python -m bench.cut_step`: a step in BF16 of DeepSeek-V2-Lite, cut to layers that fit one GPU.

Forward, backward, clipping and AdamW with fp32 masters; with natural routing and with every expert
given equally many tokens; FLOP/s beside the measured BF16 matrix rate, the peak of memory, and
transformers' model at the same sizes under the same optimizer, one after another (two would not
fit). `--plain` does without Triton kernels, and without the peer. On the CPU the sizes are small.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.one_process import Trainee, peer_step
from bench.rows import Row, note
from bench.timing import prepare, seconds
from model.backends import KernelsConfig, Wanted, set_kernels
from model.config import ModelConfig
from model.cost import count_parameters, flops_per_token
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.router import Router, RouterConfig, Routing, Score
from train.hardware import measure_matrix_rate

WARM_UPS, ROUNDS = 3, 9


class Sizes(NamedTuple):
    model: ModelConfig
    batch_size: int
    seq_len: int


def v2_lite(*, num_layers: int) -> ModelConfig:
    """configs/model/v2_lite.yaml without YaRN."""
    return ModelConfig(
        vocab_size=102400,
        dim=2048,
        num_layers=num_layers,
        ffn_dim=10944,
        attention=MLAConfig(
            num_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            nope_head_dim=128,
            rope_head_dim=64,
            v_head_dim=128,
        ),
        moe=MoEConfig(
            num_experts=64,
            top_k=6,
            expert_dim=1408,
            num_shared_experts=2,
            balance_loss_weight=0.001,
            router=RouterConfig(score=Score.softmax, renormalise=False, bias=False),
        ),
    )


def small() -> ModelConfig:
    """The same shape for a CPU."""
    config = v2_lite(num_layers=2)
    config.vocab_size, config.dim, config.ffn_dim = 512, 64, 96
    config.attention.num_heads, config.attention.kv_lora_rank = 2, 32
    config.attention.nope_head_dim = config.attention.v_head_dim = 16
    config.attention.rope_head_dim = 8
    config.moe.num_experts, config.moe.top_k, config.moe.expert_dim = 8, 2, 32
    return config


def sizes_for(device: torch.device) -> Sizes:
    """18 bytes a parameter, 2.8e9 of them, and activations, in 80 GB."""
    if device.type == "cuda":
        return Sizes(v2_lite(num_layers=5), batch_size=2, seq_len=4096)
    return Sizes(small(), batch_size=2, seq_len=64)


def balance(model: torch.nn.Module) -> None:
    """Have every router give each expert equally many tokens; scores and weights stay learned."""
    for router in model.modules():
        if isinstance(router, Router):
            router.register_forward_hook(_spread)


def _spread(_router: Router, _inputs: Any, chosen: Routing) -> Routing:
    num_experts = chosen.scores.shape[1]
    places = torch.arange(chosen.expert_ids.numel(), device=chosen.scores.device)
    expert_ids = (places % num_experts).view_as(chosen.expert_ids)
    return Routing(expert_ids, chosen.scores.gather(-1, expert_ids), chosen.scores)


def measure(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Median seconds, and the peak of memory in GiB (0 on the CPU)."""
    for _ in range(WARM_UPS):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    median = statistics.median(seconds(step) for _ in range(ROUNDS))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return median, peak / 2**30


def measure_ours(sizes: Sizes, device: torch.device, *, is_balanced: bool) -> tuple[float, float]:
    trainee = Trainee(sizes.model, device, dtype=torch.bfloat16)
    if is_balanced:
        balance(trainee.model)
    tokens = random_tokens(sizes, device, ahead=1)
    return measure(lambda: trainee.step(tokens, lr=1e-4), device)


def measure_theirs(sizes: Sizes, device: torch.device) -> tuple[float, float]:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM  # it may be missing

    ours = sizes.model
    config = DeepseekV2Config(
        vocab_size=ours.vocab_size,
        hidden_size=ours.dim,
        num_hidden_layers=ours.num_layers,
        first_k_dense_replace=ours.num_dense_layers,
        intermediate_size=ours.ffn_dim,
        num_attention_heads=ours.attention.num_heads,
        num_key_value_heads=ours.attention.num_heads,
        q_lora_rank=ours.attention.q_lora_rank,
        kv_lora_rank=ours.attention.kv_lora_rank,
        qk_nope_head_dim=ours.attention.nope_head_dim,
        qk_rope_head_dim=ours.attention.rope_head_dim,
        v_head_dim=ours.attention.v_head_dim,
        n_routed_experts=ours.moe.num_experts,
        num_experts_per_tok=ours.moe.top_k,
        moe_intermediate_size=ours.moe.expert_dim,
        n_shared_experts=ours.moe.num_shared_experts,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        max_position_embeddings=sizes.seq_len,
        use_cache=False,
    )
    with torch.device(device):
        model = DeepseekV2ForCausalLM._from_config(config, experts_implementation="grouped_mm")
    model.float().train()
    tokens = random_tokens(sizes, device)

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    return measure(peer_step(model, loss, torch.bfloat16), device)


def random_tokens(sizes: Sizes, device: torch.device, *, ahead: int = 0) -> Tensor:
    shape = (sizes.batch_size, sizes.seq_len + ahead)
    return torch.randint(sizes.model.vocab_size, shape, device=device)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--plain", action="store_true")
    is_plain = options.parse_args().plain
    if is_plain:
        names = [field.name for field in fields(KernelsConfig)]
        experts = Wanted.torch if torch.cuda.is_available() else Wanted.reference
        kept = {"experts": experts, "attention": Wanted.torch}
        wanted = dict.fromkeys(names, Wanted.reference) | kept
        set_kernels(KernelsConfig(**wanted))
    device = prepare()
    sizes = sizes_for(device)
    rate = measure_matrix_rate(device, torch.bfloat16, size=8192 if device.type == "cuda" else 512)
    tokens = sizes.batch_size * sizes.seq_len
    flops = tokens * flops_per_token(sizes.model, seq_len=sizes.seq_len)
    parameters = count_parameters(sizes.model).total
    what = (
        f"BF16 step, V2-Lite's shape with {sizes.model.num_layers} layers "
        f"({parameters / 1e9:.2f}B), {sizes.batch_size} x {sizes.seq_len} tokens"
        + ", plain PyTorch"
        * is_plain
    )
    medians = {}
    for name, is_balanced in (("forced balance", True), ("natural routing", False)):
        median, peak = measure_ours(sizes, device, is_balanced=is_balanced)
        medians[name] = median
        share = flops / median / rate
        note(
            Row(
                f"{what}, {name}",
                f"{median * 1e3:.1f} ms, {tokens / median:,.0f} tokens/s, peak {peak:.1f} GiB",
                f"measured BF16 matrix rate {rate / 1e12:.3g} TFLOP/s",
                f"{share:.1%} of it",
            )
        )
        _free()
    times = medians["natural routing"] / medians["forced balance"]
    note(
        Row(f"{what}, natural routing beside forced balance", "", "", f"{times:.3f} times as long")
    )
    if is_plain:
        return
    if find_spec("transformers") is None:
        print("no peer: transformers is not installed")
        return
    theirs, peak = measure_theirs(sizes, device)
    note(
        Row(
            f"{what}, natural routing",
            f"{medians['natural routing'] * 1e3:.1f} ms",
            f"transformers, grouped_mm: {theirs * 1e3:.1f} ms, peak {peak:.1f} GiB",
            f"{theirs / medians['natural routing']:.2f} times as fast",
        )
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
