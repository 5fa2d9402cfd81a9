"""`python -m tests.model.compile_kernels`: every kernel for each architecture it is for.

Needs triton, which brings NVIDIA's assembler, and no GPU. Not under the interpreter.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.kernels import (
    grouped,
    grouped_bf16,
    grouped_outer,
    norm,
    quantise,
    rope,
    router,
    rows,
    swiglu,
)

WIDE = {"BLOCK": 8192}  # V3's width, as a power of two


def bf16(*names: str) -> dict[str, str]:
    """Pointers to BF16."""
    return {f"{name}_ptr": "*bf16" for name in names}


INTO_TILES = {"values_ptr": "*u8", "scales_ptr": "*fp32"}
OF_FP8 = {
    "rows_ptr": "*fp8e4nv",
    "row_scales_ptr": "*fp32",
    "weights_ptr": "*fp8e4nv",
    "weight_scales_ptr": "*fp32",
    "outputs_ptr": "*bf16",
    "table_ptr": "*i32",
}
Kernel = tuple[Any, dict[str, str], dict[str, Any]]  # with its pointers and its constants
OF_FP8_PRODUCTS: list[Kernel] = [
    (
        quantise._quantise,
        {"x_ptr": "*bf16", **INTO_TILES},
        {"ROWS": 16, "TILE": 128, "POWER_OF_TWO": True},
    ),
    (
        quantise._quantise_block,
        {"weight_ptr": "*bf16", **INTO_TILES},
        {"TILE": 128, "POWER_OF_TWO": False},
    ),
    (
        swiglu._swiglu_backward,
        {
            "d_inner_ptr": "*bf16",
            "gated_ptr": "*fp8e4nv",
            "gated_scales_ptr": "*fp32",
            "upped_ptr": "*fp8e4nv",
            "upped_scales_ptr": "*fp32",
            "inner_ptr": "*bf16",
            "d_gated_ptr": "*bf16",
            "d_upped_ptr": "*bf16",
        },
        {"ROWS": 16, "TILE": 128},
    ),
    (
        swiglu._swiglu,
        {"gated_ptr": "*bf16", "upped_ptr": "*bf16", **INTO_TILES},
        {"ROWS": 16, "TILE": 128},
    ),
    *(
        (grouped._grouped, OF_FP8, {"ROWS": 64, "COLUMNS": 128, "TILE": 128, side: 1})
        for side in ("depth_stride", "column_stride")
    ),
    (
        grouped_outer._outer,
        {"y_ptr": "*bf16", "x_ptr": "*fp32", "total_ptr": "*bf16", "ends_ptr": "*i32"},
        {"BLOCK": 64, "TILE": 128, "POWER_OF_TWO": True},
    ),
]
PRODUCT = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 32}
HEADS = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
CHOICE = {"scores_ptr": "*fp32", "ids_ptr": "*i64"}
OTHERS: list[Kernel] = [
    *(
        (
            grouped_bf16._multiply,
            {**bf16("rows", "weights", "outputs"), "table_ptr": "*i32"},
            {**PRODUCT, "GROUP": 8, "row_depth_stride": 1, side: 1},
        )
        for side in ("depth_stride", "column_stride")
    ),
    (grouped_bf16._outer, {**bf16("y", "x", "total"), "ends_ptr": "*i32"}, PRODUCT),
    (norm._norm, {**bf16("x", "gain", "normed"), "inverse_ptr": "*fp32", "eps": "fp32"}, WIDE),
    (
        norm._norm_backward,
        {**bf16("grad", "x", "gain", "grad_x"), "inverse_ptr": "*fp32", "shares_ptr": "*fp32"},
        {**WIDE, "ROWS": 32},
    ),
    (
        rope._join_heads,
        {**bf16("plain", "tail", "joined"), **HEADS},
        {"IS_BACK": True, "HEADS": 8, "WIDTH": 128, "PAIRS": 32},
    ),
    (rope._sum_turned, {**bf16("grad", "total"), **HEADS}, {"HEADS": 128, "PAIRS": 32}),
    *(
        (
            router._choose,
            {**CHOICE, "bias_ptr": "*fp32", "weights_ptr": "*fp32", "scale": "fp32"},
            {
                **{"HAS_BIAS": True, "K": 8, "GROUPS": 8, "TOP_GROUPS": 4, "GROUP_SIZE": 32},
                **{"IS_GROUP_MAX": is_max, "IS_RENORMALISED": True, "EXPERTS": 256},
            },
        )
        for is_max in (True, False)
    ),
    (
        router._choose_backward,
        {**CHOICE, "grad_ptr": "*fp32", "grad_scores_ptr": "*fp32", "scale": "fp32"},
        {"K": 8, "IS_RENORMALISED": True, "EXPERTS": 256},
    ),
    (rows._gather, {**bf16("rows", "gathered"), "places_ptr": "*i64"}, {"BLOCK": 1024}),
    (
        rows._add,
        {**bf16("rows", "weights", "total"), "places_ptr": "*i64"},
        {"K": 8, "HAS_WEIGHTS": True, "BLOCK": 1024},
    ),
    (
        rows._spread,
        {**bf16("grad", "outputs", "weights", "grad_outputs", "grad_weights"), "order_ptr": "*i64"},
        {"BLOCK": 1024},
    ),
]


def main() -> None:
    """FP8 needs sm89; all else is for sm80 on."""
    for capability, kernels in (
        (80, OTHERS),
        (89, OF_FP8_PRODUCTS),
        (90, OTHERS + OF_FP8_PRODUCTS),
    ):
        for kernel in kernels:
            compile_for(capability, *kernel)


def compile_for(
    capability: int, kernel: Any, pointers: dict[str, str], constants: dict[str, Any]
) -> None:
    names = kernel.arg_names
    kinds = {name: pointers.get(name, "i32") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=kinds | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}
    )
    size, shared = len(compiled.asm["cubin"]), compiled.metadata.shared
    print(kernel.__name__, f"sm{capability}", size, "bytes,", shared, "of shared memory")


if __name__ == "__main__":
    main()
