"""`python -m bench.loss`: the chunked loss against torch's, forward and backward.

2048 positions of width 256 and a vocabulary of 8192. torch's `linear_cross_entropy`, where this
torch has it, enters whole and with each of its policies for chunks.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.floors import describe, measure_floors
from bench.rows import Row, note
from bench.timing import median_seconds, prepare
from model.loss import summed_cross_entropy
from train.profile.work import Work

POSITIONS, DIM, VOCAB_SIZE = 2048, 256, 8192
ROUNDS = 11

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum")


def candidates() -> dict[str, Loss]:
    losses: dict[str, Loss] = {"ours": summed_cross_entropy, "cross_entropy": plain}
    if hasattr(nn, "LinearCrossEntropyOptions"):  # torch 2.13
        linear = partial(F.linear_cross_entropy, reduction="sum")
        losses["linear_cross_entropy"] = linear
        for policy in ("compact", "balanced", "accurate"):
            options = nn.LinearCrossEntropyOptions(acc_policy=policy)
            losses[f"linear_cross_entropy, {policy}"] = partial(linear, options=options)
    return losses


def _pass(loss: Loss, hidden: Tensor, head: Tensor, targets: Tensor) -> None:
    torch.autograd.grad(loss(hidden, head, targets), (hidden, head))


def main() -> None:
    device = prepare()
    targets = torch.randint(VOCAB_SIZE, (POSITIONS,), device=device)
    for dtype in (torch.float32, torch.bfloat16):
        # A model's scales: far larger logits give denormal probabilities, which are slow.
        hidden, head = (
            torch.randn(rows, DIM, device=device).mul_(std).to(dtype).requires_grad_()
            for rows, std in ((POSITIONS, 1.0), (VOCAB_SIZE, 0.02))
        )
        passes = {
            name: partial(_pass, loss, hidden, head, targets) for name, loss in candidates().items()
        }
        work, floors = Work(flops=6 * POSITIONS * DIM * VOCAB_SIZE), measure_floors(device, dtype)
        medians = median_seconds(passes, rounds=ROUNDS)
        for name, duration in medians.items():
            note(
                Row(
                    f"loss, {str(dtype)[6:]}: {name}",
                    describe(duration, work, floors),
                    f"ours: {medians['ours'] * 1e3:.2f} ms",
                    f"{duration / medians['ours']:.2f} of ours",
                )
            )


if __name__ == "__main__":
    main()
