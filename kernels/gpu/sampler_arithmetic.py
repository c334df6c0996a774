"""The sampler's arithmetic, bit for bit that of `aiexport_edge.kernels.sampler`.

float32 operations that each round once, in the same order: kernels that use these are compiled without fused
multiply-adds (`COMPILE_OPTIONS`). Probability mass is counted in integers, whose sums have no order.
"""

from __future__ import annotations

import triton
import triton.language as tl

COMPILE_OPTIONS = {"enable_fp_fusion": False}
MASS_ONE = tl.constexpr(1099511627776.0)  # 2^40
EXP_UNDERFLOW = tl.constexpr(-87.0)
MAX_INVERSE_TEMPERATURE = tl.constexpr(3.0e38)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def natural_log(x):
    """Of normal positive float32 (S. Moshier, Cephes)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    small = mantissa < 0.707106781186547524
    exponent_f = (exponent - small.to(tl.int32)).to(tl.float32)
    f = tl.where(small, mantissa + mantissa, mantissa) - 1.0
    square = f * f
    y = f * 7.0376836292e-2 + -1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f + -1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f + -1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f + -2.4999993993e-1
    y = y * f + 3.3333331174e-1
    y = y * f * square
    y = y + exponent_f * -2.12194440e-4
    y = y - square * 0.5
    return f + y + exponent_f * 0.693359375


@triton.jit
def probability_mass(score):
    """exp(score) in units of 2^-40, rounded down, int64; score <= 0, -inf allowed."""
    clamped = tl.maximum(score, EXP_UNDERFLOW)
    n = tl.floor(clamped * 1.44269504088896341 + 0.5)
    r = clamped - n * 0.693359375
    r = r - n * -2.12194440e-4
    y = r * 1.9875691500e-4 + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = y * (r * r) + r + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return (tl.where(score < EXP_UNDERFLOW, 0.0, y * power) * MASS_ONE).to(tl.int64)


@triton.jit
def gumbel_noise(words):
    """-log(-log(u)) of u in (0, 1) from 32 random bits."""
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-7
    return -natural_log(-natural_log(uniform))


@triton.jit
def noise_of_run(seed, output_index, start, TILE: tl.constexpr):
    """Noise of tokens start … start+TILE-1, start a multiple of 4: a counter serves four tokens."""
    counter = start // 4 + tl.arange(0, TILE // 4)
    zeros = tl.zeros([TILE // 4], tl.int32)
    low = zeros + (output_index & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = zeros + (output_index >> 32).to(tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, counter, low, high, zeros)
    return gumbel_noise(tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3)))


@triton.jit
def noise_of_tokens(seed, output_index, tokens, TILE: tl.constexpr):
    """Noise of any tokens, int32 [TILE]."""
    zeros = tl.zeros([TILE], tl.int32)
    low = zeros + (output_index & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = zeros + (output_index >> 32).to(tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, tokens // 4, low, high, zeros)
    lane = tokens % 4
    return gumbel_noise(tl.where(lane == 0, word0, tl.where(lane == 1, word1, tl.where(lane == 2, word2, word3))))


@triton.jit
def inverse_temperature(temperature):
    """1 for greedy rows."""
    inverse = tl.minimum(tl.div_rn(1.0, tl.where(temperature > 0.0, temperature, 1.0)), MAX_INVERSE_TEMPERATURE)
    return tl.where(temperature > 0.0, inverse, 1.0)


@triton.jit
def rank_key(score):
    """An integer that orders scores <= 0 from the highest (0) on; finite scores are below INFINITY_BITS."""
    return tl.abs(score).to(tl.int32, bitcast=True)
