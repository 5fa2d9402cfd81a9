"""`python -m bench.kernels`: each Triton kernel beside its plain form, forward and backward.

At DeepSeek-V3's widths on a GPU, with bytes per second and their share of what a copy moves; what
a kernel reads and writes at least is counted, so that a plain form that passes over memory several
times shows a small share. Products in BF16 and FP8, and attention in documents: FLOP/s by each
implementation that is there. On the CPU, which has no kernels, only the plain forms of what is
fused, at small widths that caches hold.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.rows import Row, note
from bench.timing import median_seconds, prepare, seconds
from model.attention import attend
from model.backends import KernelsConfig, Wanted, choose_all, choose_rope, describe, set_kernels
from model.dispatch import combine, permute
from model.fp8_linear import linear_in_fp8
from model.fp8_swiglu import grouped_swiglu_in_fp8
from model.grouped import grouped_swiglu
from model.norm import RMSNorm
from model.rope import Rotation, join_turned, turn_tail
from model.router import RouterConfig, route
from train.hardware import measure_matrix_rate

ROUNDS, REPEATS = 7, 5


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
        rate = measure_matrix_rate(device, torch.bfloat16, size=8192)
        for work in products(shape, device):
            time_work(work, rate)


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
        str(way): Pass(KernelsConfig(**{case.key: way}), case.run, case.inputs, upstream)
        for way in ways
    }
    medians = median_seconds(passes, rounds=ROUNDS, clock=seconds_on_kernels)
    rates = {name: case.moved / duration for name, duration in medians.items()}
    told = {
        name: f"{1e3 * medians[name]:.3f} ms, {one / 1e9:.1f} GB/s, {one / bandwidth:.0%} of a copy"
        for name, one in rates.items()
    }
    name = f"{case.name}, forward and backward"
    if has_kernels:
        ratio = medians["reference"] / medians["triton"]
        plain = f"plain PyTorch: {told['reference']}"
        note(Row(f"{name}, Triton", told["triton"], plain, f"{ratio:.2f} times as fast"))
    else:
        note(Row(f"{name}, plain PyTorch", told["reference"]))
    set_kernels(KernelsConfig())


class Work(NamedTuple):
    name: str
    key: str  # of the config's section `kernels`
    ways: tuple[Wanted, ...]
    run: Callable[..., Tensor]
    inputs: list[Tensor]
    flops: int  # forward and backward


def products(shape: Shape, device: torch.device) -> list[Work]:
    """What multiplies matrices: routed experts, one matrix, attention; all with BF16 inputs."""

    def randn(*sizes: int) -> Tensor:
        x = torch.randn(*sizes, device=device, dtype=torch.bfloat16)
        return x.div_(sizes[-1] ** 0.5).requires_grad_()

    num_rows, local, dim, inner = shape.tokens * 4, shape.local, shape.dim, shape.inner_dim
    experts = [randn(num_rows, dim), *(randn(local, inner, dim) for _ in range(2))]
    experts.append(randn(local, dim, inner))
    natural = torch.multinomial(torch.rand(local), num_rows, replacement=True)
    routings = {
        "balanced": [num_rows // local] * local,
        "natural": natural.bincount(minlength=local).tolist(),
    }
    in_bf16 = (Wanted.reference, Wanted.torch, Wanted.triton)
    in_fp8 = (Wanted.triton, Wanted.torch, Wanted.deep_gemm)
    flops = 18 * num_rows * dim * inner  # three products, and twice that back
    work = [
        Work(f"experts, {name}, {kind}", key, ways, partial(run, counts=counts), experts, flops)
        for name, counts in routings.items()
        for kind, key, ways, run in (
            ("BF16", "experts", in_bf16, grouped_swiglu),
            ("FP8", "fp8", in_fp8, grouped_swiglu_in_fp8),
        )
    ]
    matrix = [randn(shape.tokens, dim), randn(inner, dim)]
    flops = 6 * shape.tokens * dim * inner
    work.append(Work("one matrix, FP8", "fp8", in_fp8, linear_in_fp8, matrix, flops))

    width, segments = shape.plain + shape.turned, [shape.tokens // 4] * 4
    heads = [randn(1, shape.tokens, shape.heads, one) for one in (width, width, shape.plain)]
    seen = sum(length * (length + 1) // 2 for length in segments)
    flops = 7 * seen * shape.heads * (width + shape.plain)  # 2 forward, 5 back
    run = partial(attend, scale=width**-0.5, segments=segments)
    ways = (Wanted.torch, Wanted.fa3, Wanted.fa4)
    return [*work, Work("attention", "attention", ways, run, heads, flops)]


def time_work(work: Work, rate: float) -> None:
    """Each implementation that this device and what is installed allow."""
    device, dtype = work.inputs[0].device, work.inputs[0].dtype
    passes = {}
    for way in work.ways:
        try:
            set_kernels(KernelsConfig(**{work.key: way}))
            choose_all(device, dtype, is_fp8=work.key == "fp8", has_experts=True)
        except ValueError as error:
            print(f"{work.name:>23} {way:>10}: {error}")
            continue
        upstream = torch.randn_like(work.run(*work.inputs))
        kernels = KernelsConfig(**{work.key: way})
        passes[str(way)] = Pass(kernels, work.run, work.inputs, upstream)
    medians = median_seconds(passes, rounds=ROUNDS, clock=seconds_on_kernels)
    first = next(iter(medians), "")
    for name, duration in medians.items():
        speed = work.flops / duration
        value = f"{1e3 * duration:.2f} ms, {speed / 1e12:.1f} TFLOP/s"
        ratio = f"{speed / rate:.0%} of the BF16 matrix rate"
        peer = ""
        if name != first:
            peer = f"{first}: {1e3 * medians[first]:.2f} ms"
            ratio += f", {medians[first] / duration:.2f} times as fast"
        note(Row(f"{work.name}, forward and backward, {name}", value, peer, ratio))
    set_kernels(KernelsConfig())


class Pass(NamedTuple):
    """Forward and backward on certain kernels."""

    kernels: KernelsConfig
    run: Callable[..., Tensor]
    inputs: list[Tensor]
    upstream: Tensor

    def __call__(self) -> None:
        torch.autograd.grad(self.run(*self.inputs), self.inputs, self.upstream)


def seconds_on_kernels(one: Pass) -> float:
    """Of one pass among several in a row, which the device need not wait for; the choice of
    kernels is made before."""
    set_kernels(one.kernels)
    one()
    return seconds(lambda: [one() for _ in range(REPEATS)]) / REPEATS


if __name__ == "__main__":
    main()
