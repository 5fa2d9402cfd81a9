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
from dataclasses import fields, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from bench.balanced import force_balance
from bench.one_process import Trainee, peer_step
from bench.rows import Row, note
from bench.sizes import V2_LITE, Sizes
from bench.timing import prepare, seconds
from model.backends import KernelsConfig, Wanted, set_kernels
from model.config import ModelConfig
from model.cost import count_parameters, flops_per_token
from model.router import RouterConfig, Score
from train.hardware import measure_matrix_rate

WARM_UPS, ROUNDS = 3, 9


# As configs/model/v2_lite.yaml has them.
MODEL = replace(
    V2_LITE,
    moe=replace(
        V2_LITE.moe,
        balance_loss_weight=0.001,
        router=RouterConfig(score=Score.softmax, renormalise=False, bias=False),
    ),
)


def small() -> ModelConfig:
    """The same shape for a CPU."""
    attention = replace(
        MODEL.attention,
        num_heads=2,
        kv_lora_rank=32,
        nope_head_dim=16,
        rope_head_dim=8,
        v_head_dim=16,
    )
    moe = replace(MODEL.moe, num_experts=8, top_k=2, expert_dim=32)
    return replace(
        MODEL, vocab_size=512, dim=64, num_layers=2, ffn_dim=96, attention=attention, moe=moe
    )


def sizes_for(device: torch.device) -> Sizes:
    """18 bytes a parameter, 2.8e9 of them, and activations, in 80 GB."""
    if device.type == "cuda":
        return Sizes(MODEL, batch_size=2, seq_len=4096)
    return Sizes(small(), batch_size=2, seq_len=64)


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
        force_balance(trainee.model)
    tokens = random_tokens(sizes, device, ahead=1)
    return measure(lambda: trainee.step(tokens, lr=1e-4), device)


def measure_theirs(sizes: Sizes, device: torch.device) -> tuple[float, float]:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM  # it may be missing

    from bench.peer import their_sizes

    config = DeepseekV2Config(
        **their_sizes(sizes.model, seq_len=sizes.seq_len), topk_method="greedy"
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
