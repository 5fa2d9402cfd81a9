"""`python -m bench.step`: our training step against transformers' DeepseekV3ForCausalLM.

Same sizes, same process, in turns: forward, backward, clipping by the global norm, AdamW (the same
optimizer for both), in fp32. transformers enters with the fastest of its experts implementations.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from bench.timing import median_seconds, prepare
from model.config import ModelConfig
from model.cost import count_parameters, flops_per_token
from model.init import initialise
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.router import RouterConfig
from model.transformer import Transformer
from train.hardware import measure_matrix_rate
from train.optimizer.config import OptimizerConfig, build_optimizer, parameter_groups

BATCH_SIZE, SEQ_LEN = 4, 512
ROUNDS = 11
OPTIMIZER = OptimizerConfig()
OURS = ModelConfig(
    vocab_size=8192,
    dim=256,
    num_layers=6,
    ffn_dim=640,
    init_std=0.02,
    attention=MLAConfig(
        num_heads=8,
        q_lora_rank=128,
        kv_lora_rank=128,
        nope_head_dim=32,
        rope_head_dim=16,
        v_head_dim=32,
    ),
    moe=MoEConfig(num_experts=32, top_k=4, expert_dim=128, router=RouterConfig()),
)
THEIRS = DeepseekV3Config(
    vocab_size=OURS.vocab_size,
    hidden_size=OURS.dim,
    num_hidden_layers=OURS.num_layers,
    first_k_dense_replace=OURS.num_dense_layers,
    intermediate_size=OURS.ffn_dim,
    initializer_range=OURS.init_std,
    num_attention_heads=OURS.attention.num_heads,
    num_key_value_heads=OURS.attention.num_heads,
    q_lora_rank=OURS.attention.q_lora_rank,
    kv_lora_rank=OURS.attention.kv_lora_rank,
    qk_nope_head_dim=OURS.attention.nope_head_dim,
    qk_rope_head_dim=OURS.attention.rope_head_dim,
    v_head_dim=OURS.attention.v_head_dim,
    n_routed_experts=OURS.moe.num_experts,
    num_experts_per_tok=OURS.moe.top_k,
    moe_intermediate_size=OURS.moe.expert_dim,
    n_shared_experts=OURS.moe.num_shared_experts,
    routed_scaling_factor=OURS.moe.router.scale,
    n_group=1,
    topk_group=1,
    max_position_embeddings=SEQ_LEN,
    use_cache=False,
)
EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def our_step(device: torch.device) -> Callable[[], Tensor]:
    """One step of our model on random tokens, balance loss included; returns the loss."""
    model = Transformer(OURS)
    initialise(model, seed=0, std=OURS.init_std)
    model.to(device)
    tokens = torch.randint(OURS.vocab_size, (BATCH_SIZE, SEQ_LEN), device=device)
    positions = torch.arange(SEQ_LEN, device=device).expand_as(tokens)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    targets = tokens.roll(-1, dims=1)

    def loss() -> Tensor:
        sums = model(tokens, targets, positions, counted, segments=[SEQ_LEN] * BATCH_SIZE)
        balance_loss = OURS.moe.balance_loss_weight * sums.balance_loss / BATCH_SIZE
        return sums.loss / tokens.numel() + balance_loss

    return partial(_step, model, _optimizer(model), loss)


def their_step(experts_implementation: str, device: torch.device) -> Callable[[], Tensor]:
    """The same with transformers' model."""
    model = DeepseekV3ForCausalLM._from_config(
        THEIRS, experts_implementation=experts_implementation
    )
    model.to(device).train()
    tokens = torch.randint(OURS.vocab_size, (BATCH_SIZE, SEQ_LEN), device=device)

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    return partial(_step, model, _optimizer(model), loss)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = build_optimizer(parameter_groups(model, OPTIMIZER), OPTIMIZER)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    return optimizer


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, compute_loss: Callable[[], Tensor]
) -> Tensor:
    loss = compute_loss()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def main() -> None:
    device = prepare()
    counted = count_parameters(OURS)
    print(f"{counted.total / 1e6:.1f}M parameters, {BATCH_SIZE} x {SEQ_LEN} tokens, fp32")

    trials = {}
    for name in EXPERTS_IMPLEMENTATIONS:  # one after another: batched_mm alone needs 9 GB
        trials |= median_seconds({name: their_step(name, device)}, rounds=1, warm_ups=1)
        print(f"transformers, {name:>10}: {trials[name] * 1e3:7.0f} ms (one step, to choose)")
    best = min(trials, key=trials.__getitem__)

    steps = {"ours": our_step(device), "theirs": their_step(best, device)}
    medians = median_seconds(steps, rounds=ROUNDS)
    rate = measure_matrix_rate(device, torch.float32, size=1024)
    tokens = BATCH_SIZE * SEQ_LEN
    flops = tokens * flops_per_token(OURS, seq_len=SEQ_LEN) / medians["ours"]
    print(f"transformers, {best:>10}: {medians['theirs'] * 1e3:7.1f} ms (median of {ROUNDS})")
    print(f"ours                    : {medians['ours'] * 1e3:7.1f} ms (median of {ROUNDS})")
    print(f"ratio of medians        : {medians['theirs'] / medians['ours']:7.2f}")
    print(f"tokens/s                : {tokens / medians['ours']:7.0f}")
    print(
        f"GFLOP/s                 : {flops / 1e9:7.0f}, {flops / rate:.0%} of this machine's "
        f"{rate / 1e9:.0f} in fp32 matrix products"
    )


if __name__ == "__main__":
    main()
