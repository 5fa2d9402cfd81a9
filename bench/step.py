"""`python -m bench.step`: our training step against transformers' DeepseekV3ForCausalLM.

Same sizes, same process, in turns: forward, backward, clipping by the global norm, AdamW (the same
optimizer for both), in fp32; with the routing as it falls, and with forced balance (both of them).
transformers enters with the fastest of its experts implementations.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM

from bench.balanced import force_balance
from bench.floors import describe, measure_floors
from bench.peer import EXPERTS_IMPLEMENTATIONS, peer_config
from bench.rows import Row, note
from bench.timing import median_seconds, prepare
from model.config import ModelConfig
from model.cost import count_parameters, flops_per_token
from model.init import initialise
from model.mla import MLAConfig
from model.moe import MoEConfig
from model.router import RouterConfig
from model.transformer import Transformer
from train.optimizer.config import OptimizerConfig, build_optimizer, parameter_groups
from train.profile.work import Work

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


def our_step(device: torch.device, *, is_balanced: bool = False) -> Callable[[], Tensor]:
    """One step of our model on random tokens, balance loss included; returns the loss."""
    model = Transformer(OURS)
    initialise(model, seed=0, std=OURS.init_std)
    if is_balanced:
        force_balance(model)
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


def their_step(
    experts_implementation: str, device: torch.device, *, is_balanced: bool = False
) -> Callable[[], Tensor]:
    """The same with transformers' model."""
    theirs = peer_config(OURS, seq_len=SEQ_LEN, experts=experts_implementation)
    model = DeepseekV3ForCausalLM._from_config(
        theirs, experts_implementation=experts_implementation
    )
    if is_balanced:
        force_balance(model)
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
    for name in EXPERTS_IMPLEMENTATIONS[device.type]:  # one after another: batched_mm needs 9 GB
        trials |= median_seconds({name: their_step(name, device)}, rounds=1, warm_ups=1)
        print(f"transformers, {name:>10}: {trials[name] * 1e3:7.0f} ms (one step, to choose)")
    best = min(trials, key=trials.__getitem__)

    floors = measure_floors(device, torch.float32)
    tokens = BATCH_SIZE * SEQ_LEN
    work = Work(flops=tokens * flops_per_token(OURS, seq_len=SEQ_LEN))
    for routing in ("natural", "balanced"):
        is_balanced = routing == "balanced"
        steps = {
            "ours": our_step(device, is_balanced=is_balanced),
            f"transformers, {best}": their_step(best, device, is_balanced=is_balanced),
        }
        medians = median_seconds(steps, rounds=ROUNDS)
        for name, seconds in medians.items():
            told = f"{describe(seconds, work, floors)}, {tokens / seconds:,.0f} tokens/s"
            ratio = seconds / medians["ours"]
            note(Row(f"step, routing {routing}: {name}", told, "", f"{ratio:.2f} of ours"))


if __name__ == "__main__":
    main()
