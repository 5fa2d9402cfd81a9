"""`python -m bench.kernels`: each Triton kernel beside its plain form, forward and backward.

At DeepSeek-V3's widths on a GPU, with bytes per second and their share of what a copy moves; what
a kernel reads and writes at least is counted, so that a plain form that passes over memory several
times shows a small share. Grouped products: FLOP/s, beside torch's grouped_mm and a loop. On the
CPU, which has no kernels, only the plain forms, at small widths that caches hold.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.timing import median_seconds, prepare
from model.backends import KernelsConfig, Wanted, choose_all, choose_rope, describe, set_kernels
from model.dispatch import combine, permute
from model.grouped import grouped_swiglu
from model.norm import RMSNorm
from model.rope import Rotation, join_turned, turn_tail
from model.router import RouterConfig, route
from train.hardware import measure_matrix_rate

ROUNDS = 11


class Shape(NamedTuple):
    tokens: int
    dim: int
    heads: int
    plain: int  # width of a head without position
    turned: int  # and with it
    experts: int
    top_k: int
    groups: int
    local: int  # experts of this device
    inner_dim: int


ON_GPU = Shape(4096, 7168, 128, 128, 64, 256, 8, 8, 32, 2048)
ON_CPU = Shape(512, 256, 8, 32, 16, 32, 4, 4, 8, 64)


class Case(NamedTuple):
    name: str
    key: str  # of the config's section `kernels`
    run: Callable[..., Tensor]
    inputs: list[Tensor]  # for which there are gradients
    moved: int  # bytes read and written at least, forward and backward together


def main() -> None:
    device = prepare()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = ON_GPU if device.type == "cuda" else ON_CPU
    print(describe(choose_all(device, dtype, is_fp8=False, has_experts=True)))
    has_kernels = choose_rope(device).backend == Wanted.triton
    bandwidth = measure_copy(device)
    print(f"a copy moves {bandwidth / 1e9:.1f} GB/s")
    for case in cases(shape, device, dtype):
        time_case(case, bandwidth, has_kernels=has_kernels)
    if device.type == "cuda":
        time_experts(shape, device, has_kernels=has_kernels)


def measure_copy(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    x = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_seconds({"copy": lambda: y.copy_(x)}, rounds=ROUNDS)["copy"]


def cases(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What is fused, each with its inputs."""

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype, requires_grad=True)

    tokens, dim, top_k = shape.tokens, shape.dim, shape.top_k
    x, rows = randn(tokens, dim), randn(tokens * top_k, dim)
    query = randn(1, tokens, shape.heads, shape.plain + shape.turned)
    key, shared = randn(1, tokens, shape.heads, shape.plain), randn(1, tokens, 1, shape.turned)
    angles = torch.randn(1, tokens, shape.turned // 2, device=device)
    by = Rotation(angles.cos(), angles.sin())
    scores = torch.rand(tokens, shape.experts, device=device, requires_grad=True)
    weights = randn(tokens, top_k)
    order = torch.randperm(tokens * top_k, device=device)
    norm = RMSNorm(dim, eps=1e-6).to(device, dtype)
    torch.nn.init.ones_(norm.weight)
    config = RouterConfig(num_groups=shape.groups, top_groups=max(shape.groups // 2, 1))
    bias = torch.zeros(shape.experts, device=device)

    def choose(scores: Tensor) -> Tensor:
        return route(scores, bias, config=config, top_k=top_k).weights

    whole = query.nbytes
    return [
        Case("RMSNorm", "norm", norm, [x], 5 * x.nbytes),
        Case("RoPE, query", "rope", lambda x: turn_tail(x, by), [query], 4 * whole),
        # Backward, the part without position is a view.
        Case(
            "RoPE, key",
            "rope",
            lambda plain, shared: join_turned(plain, shared, by),
            [key, shared],
            key.nbytes + whole + whole * shape.turned // (shape.plain + shape.turned),
        ),
        Case("router's choice", "router", choose, [scores], 3 * scores.nbytes),
        Case(
            "rows out",
            "rows",
            lambda x: permute(x, order, top_k=top_k),
            [x],
            2 * (x.nbytes + rows.nbytes),
        ),
        Case(
            "results back",
            "rows",
            lambda rows, weights: combine(rows, weights, order),
            [rows, weights],
            3 * rows.nbytes + 2 * x.nbytes,
        ),
    ]


def time_case(case: Case, bandwidth: float, *, has_kernels: bool) -> None:
    upstream = torch.randn_like(case.run(*case.inputs))
    ways = [Wanted.reference, Wanted.triton] if has_kernels else [Wanted.reference]
    passes = {
        str(way): partial(_pass, KernelsConfig(**{case.key: way}), case.run, case.inputs, upstream)
        for way in ways
    }
    for name, duration in median_seconds(passes, rounds=ROUNDS).items():
        rate = case.moved / duration
        print(
            f"{case.name:>16} {name:>10}: {duration * 1e3:8.3f} ms, {rate / 1e9:8.1f} GB/s, "
            f"{rate / bandwidth:.0%} of a copy"
        )
    set_kernels(KernelsConfig())


def time_experts(shape: Shape, device: torch.device, *, has_kernels: bool) -> None:
    """The routed experts in BF16, with as many rows for each and with uneven ones."""
    total = measure_matrix_rate(device, torch.bfloat16, size=8192)
    num_rows, local, dim, inner = shape.tokens * 4, shape.local, shape.dim, shape.inner_dim
    sizes = [(num_rows, dim), *[(local, inner, dim)] * 2, (local, dim, inner)]
    inputs = [
        torch.randn(one, device=device, dtype=torch.bfloat16).div_(dim**0.5).requires_grad_()
        for one in sizes
    ]
    natural = torch.multinomial(torch.rand(local), num_rows, replacement=True)
    routings = {
        "balanced": [num_rows // local] * local,
        "natural": natural.bincount(minlength=local).tolist(),
    }
    upstream = torch.randn_like(inputs[0])
    ways = [Wanted.reference, Wanted.torch] + [Wanted.triton] * has_kernels
    for routing, counts in routings.items():
        run = partial(grouped_swiglu, counts=counts)
        passes = {
            str(way): partial(_pass, KernelsConfig(experts=way), run, inputs, upstream)
            for way in ways
        }
        for name, duration in median_seconds(passes, rounds=ROUNDS).items():
            rate = 18 * num_rows * dim * inner / duration  # three products, and twice that back
            print(
                f"experts, {routing:>8} {name:>10}: {duration * 1e3:8.2f} ms, "
                f"{rate / 1e12:.1f} TFLOP/s, {rate / total:.0%} of the BF16 matrix rate"
            )
    set_kernels(KernelsConfig())


def _pass(
    kernels: KernelsConfig, run: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor
) -> None:
    set_kernels(kernels)
    torch.autograd.grad(run(*inputs), inputs, upstream)


if __name__ == "__main__":
    main()
