"""Pieces that several kernels share: FP8 E4M3 by its bits, and how a row or head is spread over warps.

FP8 KV caches are stored as bytes and coded by integer arithmetic on every architecture: below compute capability 8.9
the compiler refuses the type even for a load, and one code for all is one to test (OCP 8-bit floating point
specification, rev. 1.0: E4M3 has bias 7, no infinities, largest finite 448).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and taking away 1.5 * 2^23 rounds a float32 of magnitude below 2^22 to the nearest integer, ties to even.
ROUND_TO_INTEGER = tl.constexpr(12582912.0)
E4M3_LARGEST = tl.constexpr(448.0)


@triton.jit
def encode_e4m3(x):
    """float32 to the byte of the nearest E4M3 number, ties to even; beyond 448 it saturates. NaN is not expected."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), E4M3_LARGEST)
    wide = magnitude.to(tl.int32, bitcast=True)
    # Keep 3 bits of mantissa; a carry runs into the exponent, as it should. Then the bias goes from 127 to 7.
    normal = ((wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 codes are multiples of 2^-9: the sum's low mantissa bits are the rounded integer.
    subnormal = (magnitude * 512.0 + ROUND_TO_INTEGER).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    return (sign | code).to(tl.uint8)


@triton.jit
def decode_e4m3(code, dtype: tl.constexpr):
    """The byte's value times 2^-8, exact in float16, bfloat16 and float32: the caller's scale makes up for it.

    E4M3's exponent and mantissa are the upper bits of float16's but for the bias (7, not 15), subnormals included.
    """
    wide = code.to(tl.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    if dtype == tl.float16:
        return half
    else:
        return half.to(tl.float32).to(dtype)


E4M3_DECODED_SCALE = 256.0  # what `decode_e4m3`'s result is to be multiplied by


def num_warps_for(elements: int, *, per_thread: int = 8, most: int = 16) -> int:
    """Warps so that each thread holds `per_thread` elements (8 of 16 bits are one 16-byte load), a power of two."""
    warps = 1
    while warps < most and warps * 32 * per_thread < elements:
        warps *= 2
    return warps
