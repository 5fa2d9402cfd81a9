"""E4M3 on the bits, inside kernels: the same rounding on every device, and under the interpreter.

Triton's own conversion needs sm89, and that of its interpreter (3.9) loses the carry of a mantissa.
"""

from typing import no_type_check

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(1.1754943508222875e-38)  # fp32's smallest normal number


@triton.jit
@no_type_check
def choose_scale(largest, is_nan, POWER_OF_TWO: tl.constexpr):
    """`model.fp8.choose_scales`: 1 where all values are 0, NaN where one is."""
    scale = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST_SCALE)
    scale = tl.where(largest == 0.0, 1.0, scale)
    if POWER_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    return tl.where(is_nan, float("nan"), scale)


@triton.jit
@no_type_check
def encode(x):
    """The nearest E4M3 number to each fp32 number, ties to even, as its byte. NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # Below 2^-6, adding 2^14 leaves the number of steps of 2^-9 in the last bits.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - (141 << 23)
    code = tl.where(magnitude < (121 << 23), subnormal, normal)
    code = tl.where(magnitude >= (1087 << 20), 0x7F, code)  # 480 and more, infinity, NaN
    return (code | sign).to(tl.uint8)
