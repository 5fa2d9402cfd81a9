"""`python -m bench.grouped`: the experts' loop against torch's grouped_mm and, balanced, bmm.

One layer's experts, forward and backward: 8192 rows of width 256 through 32 networks of 128.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.floors import describe, measure_floors
from bench.rows import Row, note
from bench.timing import median_seconds, prepare
from model.grouped import grouped_swiglu
from train.profile.work import Work

ROWS, EXPERTS, DIM, INNER_DIM = 8192, 32, 256, 128
ROUNDS = 15

Experts = Callable[..., Tensor]


def by_grouped_mm(
    rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: list[int]
) -> Tensor:
    ends = torch.tensor(counts, device=rows.device).cumsum(0, dtype=torch.int32)
    gated, upped = (F.grouped_mm(rows, weights.mT, offs=ends) for weights in (gate, up))
    return F.grouped_mm(F.silu(gated) * upped, down.mT, offs=ends)


def by_bmm(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    of_experts = rows.unflatten(0, (len(counts), -1))
    inner = F.silu(of_experts @ gate.mT) * (of_experts @ up.mT)
    return (inner @ down.mT).flatten(0, 1)


def ours(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    return grouped_swiglu(rows, gate, up, down, counts=counts)


def _pass(experts: Experts, inputs: list[Tensor], counts: list[int], upstream: Tensor) -> None:
    torch.autograd.grad(experts(*inputs, counts), inputs, upstream)


def main() -> None:
    device = prepare()
    natural = torch.multinomial(torch.rand(EXPERTS), ROWS, replacement=True).bincount().tolist()
    balanced = [ROWS // EXPERTS] * EXPERTS
    shapes = [
        (ROWS, DIM),
        (EXPERTS, INNER_DIM, DIM),
        (EXPERTS, INNER_DIM, DIM),
        (EXPERTS, DIM, INNER_DIM),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [
            torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes
        ]
        upstream = torch.randn_like(inputs[0])
        work, floors = Work(flops=18 * ROWS * DIM * INNER_DIM), measure_floors(device, dtype)
        for routing, counts in (("natural", natural), ("balanced", balanced)):
            candidates: dict[str, Experts] = {"ours": ours, "grouped_mm": by_grouped_mm}
            if routing == "balanced":
                candidates["bmm"] = by_bmm
            passes = {
                name: partial(_pass, experts, inputs, counts, upstream)
                for name, experts in candidates.items()
            }
            medians = median_seconds(passes, rounds=ROUNDS)
            for name, duration in medians.items():
                note(
                    Row(
                        f"experts, {str(dtype)[6:]}, {routing}: {name}",
                        describe(duration, work, floors),
                        f"ours: {medians['ours'] * 1e3:.2f} ms",
                        f"{duration / medians['ours']:.2f} of ours",
                    )
                )


if __name__ == "__main__":
    main()
