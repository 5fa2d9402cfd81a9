"""`python -m tests.model.compile_kernels`: every kernel for each architecture it is for.

Needs triton, which brings NVIDIA's assembler, and no GPU. Not under the interpreter.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.kernels import grouped, grouped_outer, quantise, swiglu

INTO_TILES = {"values_ptr": "*u8", "scales_ptr": "*fp32"}
OF_FP8 = {
    "rows_ptr": "*fp8e4nv",
    "row_scales_ptr": "*fp32",
    "weights_ptr": "*fp8e4nv",
    "weight_scales_ptr": "*fp32",
    "outputs_ptr": "*bf16",
    "table_ptr": "*i32",
}
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
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


def main() -> None:
    for capability in (89, 90):
        for kernel, pointers, constants in KERNELS:
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
            print(kernel.__name__, f"sm{capability}", len(compiled.asm["cubin"]), "bytes")


if __name__ == "__main__":
    main()
