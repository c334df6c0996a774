"""Sampling. A unit of work is a row of logits.

Top-k and top-p search their threshold with histograms of the scores' bits (a radix select: no sorting), and only in
rows that ask. Everything that decides rounds exactly as the reference does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]

from aiexport_edge.kernels import philox
from aiexport_edge.kernels import sampler as definition
from aiexport_edge.kernels.cpu import memory, simd
from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.memory import (
    get_float32,
    get_int32,
    get_int64,
    load,
    load_first,
    set_float32,
    set_int64,
    store,
)
from aiexport_edge.kernels.cpu.simd import (
    FLOATS,
    I32,
    I64,
    LANES,
    LONGS,
    WORDS,
    add,
    constant,
    keep_lanes,
    max_lanes,
    maximum,
    multiply,
    operation,
    splat,
    sum_lanes,
)
from aiexport_edge.kernels.cpu.units import begin, end, next_unit
from aiexport_edge.kernels.threads import launch

CHUNK = 4 * LANES  # tokens of 16 Philox counters
MASS_ONE = definition.MASS_ONE
MAX_INVERSE_TEMPERATURE = definition.MAX_INVERSE_TEMPERATURE


def _exp(builder: Any, x: Any) -> Any:
    """`definition._exp`, operation by operation."""
    lowest = constant(FLOATS, definition.EXP_UNDERFLOW)
    underflow = builder.fcmp_ordered("<", x, lowest)
    clamped = builder.select(underflow, lowest, x)
    n = builder.fadd(builder.fmul(clamped, constant(FLOATS, definition.LOG2_E)), constant(FLOATS, 0.5))
    n = simd.call(builder, "llvm.floor.v16f32", FLOATS, n)
    r = builder.fsub(clamped, builder.fmul(n, constant(FLOATS, definition.LN2_HIGH)))
    r = builder.fsub(r, builder.fmul(n, constant(FLOATS, definition.LN2_LOW)))
    y = constant(FLOATS, definition.EXP_COEFFICIENTS[0])
    for coefficient in definition.EXP_COEFFICIENTS[1:]:
        y = builder.fadd(builder.fmul(y, r), constant(FLOATS, coefficient))
    y = builder.fadd(builder.fadd(builder.fmul(y, builder.fmul(r, r)), r), constant(FLOATS, 1.0))
    exponent = builder.add(builder.fptosi(n, WORDS), constant(WORDS, 127))
    power = builder.bitcast(builder.shl(exponent, constant(WORDS, 23)), FLOATS)
    return builder.select(underflow, constant(FLOATS, 0.0), builder.fmul(y, power))


def _log(builder: Any, x: Any) -> Any:
    """`definition._log`, operation by operation."""
    bits = builder.bitcast(x, WORDS)
    exponent = builder.sub(builder.ashr(bits, constant(WORDS, 23)), constant(WORDS, 126))
    mantissa = builder.or_(builder.and_(bits, constant(WORDS, 0x007FFFFF)), constant(WORDS, 0x3F000000))
    mantissa = builder.bitcast(mantissa, FLOATS)
    small = builder.fcmp_ordered("<", mantissa, constant(FLOATS, definition.SQRT_HALF))
    exponent = builder.sitofp(builder.sub(exponent, builder.zext(small, WORDS)), FLOATS)
    f = builder.select(small, builder.fadd(mantissa, mantissa), mantissa)
    f = builder.fsub(f, constant(FLOATS, 1.0))
    square = builder.fmul(f, f)
    y = constant(FLOATS, definition.LOG_COEFFICIENTS[0])
    for coefficient in definition.LOG_COEFFICIENTS[1:]:
        y = builder.fadd(builder.fmul(y, f), constant(FLOATS, coefficient))
    y = builder.fmul(builder.fmul(y, f), square)
    y = builder.fadd(y, builder.fmul(exponent, constant(FLOATS, definition.LN2_LOW)))
    y = builder.fsub(y, builder.fmul(square, constant(FLOATS, 0.5)))
    return builder.fadd(builder.fadd(f, y), builder.fmul(exponent, constant(FLOATS, definition.LN2_HIGH)))


def _masses(builder: Any, scores: Any) -> Any:
    return builder.fptosi(builder.fmul(_exp(builder, scores), constant(FLOATS, MASS_ONE)), LONGS)


@operation(simd.none, simd.int64, simd.vector)
def add_masses(builder: Any, target: Any, scores: Any) -> None:
    """Add the masses of sixteen scores to sixteen int64."""
    place = memory.pointer(builder, target, LONGS)
    builder.store(builder.add(builder.load(place, align=8, typ=LONGS), _masses(builder, scores)), place, align=8)


@operation(simd.none, simd.int64, simd.vector)
def store_masses(builder: Any, target: Any, scores: Any) -> None:
    """The masses of sixteen scores as int64."""
    builder.store(_masses(builder, scores), memory.pointer(builder, target, LONGS), align=8)


@operation(simd.vector, simd.vector, simd.vector)
def keep_nan(builder: Any, found: Any, value: Any) -> Any:
    """`value` where it is NaN, else `found`."""
    return builder.select(builder.fcmp_unordered("uno", value, value), value, found)


@operation(simd.vector, simd.vector, simd.int64)
def keep_allowed(builder: Any, value: Any, bits: Any) -> Any:
    """Lanes of `value` whose bit is 1, minus infinity in the others."""
    allowed = builder.bitcast(builder.trunc(bits, simd.I16), ir.VectorType(ir.IntType(1), LANES))
    return builder.select(allowed, value, constant(FLOATS, float("-inf")))


@operation(simd.none, simd.int64, simd.int64, simd.int64, simd.int64)
def draw_words(builder: Any, target: Any, seed: Any, first_counter: Any, output_index: Any) -> None:
    """Philox4x32-10 of sixteen counters: 64 words, in the order of the tokens they belong to."""

    def halves(value: Any) -> tuple[Any, Any]:
        high = builder.trunc(builder.lshr(value, ir.Constant(I64, 32)), I32)
        return builder.trunc(value, I32), high

    def multiply_words(number: int, words: Any) -> tuple[Any, Any]:
        product = builder.mul(builder.zext(words, LONGS), constant(LONGS, number))
        return builder.trunc(builder.lshr(product, constant(LONGS, 32)), WORDS), builder.trunc(product, WORDS)

    c0 = simd.broadcast(builder, builder.trunc(first_counter, I32), WORDS)
    c0 = builder.add(c0, ir.Constant(WORDS, list(range(LANES))))
    c1, c2 = (simd.broadcast(builder, half, WORDS) for half in halves(output_index))
    c3 = constant(WORDS, 0)
    key_a, key_b = (simd.broadcast(builder, half, WORDS) for half in halves(seed))
    for _ in range(philox.NUM_ROUNDS):
        high_a, low_a = multiply_words(philox.ROUND_A, c0)
        high_b, low_b = multiply_words(philox.ROUND_B, c2)
        c0, c1 = builder.xor(builder.xor(high_b, c1), key_a), low_b
        c2, c3 = builder.xor(builder.xor(high_a, c3), key_b), low_a
        key_a = builder.add(key_a, constant(WORDS, philox.KEY_A))
        key_b = builder.add(key_b, constant(WORDS, philox.KEY_B))

    def interleave(left: Any, right: Any, run: int) -> Any:
        """Runs of `run` words in turn from left and right."""
        size = left.type.count
        order = [(side * size + i + j) for i in range(0, size, run) for side in (0, 1) for j in range(run)]
        return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, 2 * size), order))

    words = interleave(interleave(c0, c1, 1), interleave(c2, c3, 1), 2)
    builder.store(words, memory.pointer(builder, target, words.type), align=4)


@operation(simd.vector, simd.int64)
def load_gumbel(builder: Any, words: Any) -> Any:
    """-log(-log(u)) of sixteen random words in memory."""
    bits = builder.lshr(memory.read(builder, words, WORDS), constant(WORDS, 9))
    uniform = builder.fadd(builder.sitofp(bits, FLOATS), constant(FLOATS, 0.5))
    uniform = builder.fmul(uniform, constant(FLOATS, 2.0**-23))
    exponential = builder.fneg(_log(builder, uniform))
    return builder.fneg(_log(builder, exponential))


@inner
def _first_equal(values: int, count: int, wanted: float) -> int:
    """Index of the first of `count` float32 (padded to 16) that equals `wanted`, which is the largest."""
    for i in range(0, count, LANES):
        if max_lanes(load(values + 4 * i)) == wanted:
            for lane in range(i, i + LANES):
                if get_float32(values, lane) == wanted:
                    return lane
    return 0


@inner
def _score_row(logits: int, mask: int, count: int, padded: int, temperature: float, scores: int) -> bool:
    """(logit - highest) / temperature to `scores`, -inf beyond `count` and where the mask's bit is 0 (a mask of address
    0 allows all); false where the row has no distribution."""
    highest, odd = splat(np.float32(-np.inf)), splat(np.float32(0.0))
    for i in range(0, padded, LANES):
        if i + LANES <= count:
            v = load(logits + 4 * i)
        else:
            v = keep_lanes(load_first(logits + 4 * i, count - i), 0, count - i)
        if mask != 0 and i < count:
            v = keep_allowed(v, get_int32(mask, i // 32) >> (i & 16))
        highest, odd = maximum(v, highest), keep_nan(odd, v)
        store(scores + 4 * i, v)
    largest = max_lanes(highest)
    if not (math.isfinite(largest) and math.isfinite(sum_lanes(odd))):
        return False
    inverse = np.float32(1.0)
    if temperature > 0.0:
        inverse = min(np.float32(1.0) / np.float32(temperature), np.float32(MAX_INVERSE_TEMPERATURE))
    shift, factor = splat(-largest), splat(inverse)
    for i in range(0, padded, LANES):
        store(scores + 4 * i, multiply(add(load(scores + 4 * i), shift), factor))
    return True


@inner
def _bits(scores: int, i: int) -> int:
    """Scores are at most 0, so the bits of their magnitude rise as they fall."""
    bits: int = get_int32(scores, i) & 0x7FFFFFFF
    return bits


@inner
def _keep_top(scores: int, padded: int, masses: int, limit: int, histogram: int) -> None:
    """Set to -inf every score before which, by falling score and rising id, `limit` of mass (int64) has gone."""
    prefix, before = 0, 0
    for level in range(3):
        shift = 20 - 10 * level
        for digit in range(2048):
            set_int64(histogram, digit, 0)
        for i in range(padded):
            bits = _bits(scores, i)
            if level == 0 or bits >> (shift + 10) == prefix:
                digit = (bits >> shift) & (2047 if level == 0 else 1023)
                set_int64(histogram, digit, get_int64(histogram, digit) + get_int64(masses, i))
        digit = 0
        while before + get_int64(histogram, digit) < limit:
            before += get_int64(histogram, digit)
            digit += 1
            if digit == 2048:
                return
        prefix = prefix << 10 | digit
    for i in range(padded):
        bits = _bits(scores, i)
        if bits == prefix and before < limit:
            before += get_int64(masses, i)
        elif bits >= prefix:
            set_float32(scores, i, np.float32(-np.inf))


@inner
def _draw(scores: int, padded: int, seed: int, output_index: int, words: int) -> int:
    """The id with the largest score plus noise."""
    best, token = np.float32(-np.inf), 0
    for i in range(0, padded, CHUNK):
        place = scores + 4 * i
        highest = maximum(maximum(load(place), load(place + 64)), maximum(load(place + 128), load(place + 192)))
        if max_lanes(highest) == np.float32(-np.inf):
            continue
        draw_words(words, seed, i // 4, output_index)
        highest = splat(np.float32(-np.inf))
        for j in range(0, 4 * CHUNK, 4 * LANES):
            noisy = add(load(place + j), load_gumbel(words + j))
            store(words + j, noisy)
            highest = maximum(noisy, highest)
        if max_lanes(highest) > best:
            best = max_lanes(highest)
            token = i + _first_equal(words, CHUNK, best)
    return token


@kernel
def sample_rows(
    control: int,
    scratch: int,
    num_units: int,
    logits: int,
    row_bytes: int,
    bitmask: int,
    mask_bytes: int,
    vocabulary: int,
    temperature: int,
    top_k: int,
    top_p: int,
    seeds: int,
    output_index: int,
    ids: int,
    logprobs: int,
) -> None:
    """One id and log-probability for each row."""
    padded = (vocabulary + CHUNK - 1) // CHUNK * CHUNK
    masses = scratch
    histogram = masses + 8 * padded
    sums = histogram + 8 * 2048
    words = sums + 8 * LANES
    scores = words + 4 * CHUNK
    unit = begin(control)
    while unit < num_units:
        heat = get_float32(temperature, unit)
        mask = bitmask + unit * mask_bytes if bitmask != 0 else 0
        if not _score_row(logits + unit * row_bytes, mask, vocabulary, padded, heat, scores):
            set_int64(ids, unit, 0)
            set_float32(logprobs, unit, np.float32(np.nan))
            unit = next_unit(control)
            continue
        for lane in range(LANES):
            set_int64(sums, lane, 0)
        for i in range(0, padded, LANES):
            add_masses(sums, load(scores + 4 * i))
        total = 0
        for lane in range(LANES):
            total += get_int64(sums, lane)

        if heat > 0.0:
            share, most = get_float32(top_p, unit), get_int32(top_k, unit)
            if 0 < most < vocabulary:
                for i in range(padded):
                    set_int64(masses, i, 1)
                _keep_top(scores, padded, masses, most, histogram)
            if share < 1.0:
                for i in range(0, padded, LANES):
                    store_masses(masses + 8 * i, load(scores + 4 * i))
                kept = 0
                for i in range(padded):
                    kept += get_int64(masses, i)
                _keep_top(scores, padded, masses, max(1, int(float(kept) * float(share))), histogram)
            token = _draw(scores, padded, get_int64(seeds, unit), get_int64(output_index, unit), words)
        else:
            token = _first_equal(scores, padded, 0.0)
        set_int64(ids, unit, token)
        score = float(get_float32(scores, token))
        set_float32(logprobs, unit, np.float32(score - math.log(float(total) / MASS_ONE)))
        unit = next_unit(control)
    end(control)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    output_index: torch.Tensor,
    bitmask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `aiexport_edge.kernels.sampler.sample_reference`."""
    num_rows, vocabulary = logits.shape
    assert logits.dtype == temperature.dtype == top_p.dtype == torch.float32
    assert top_k.dtype == torch.int32
    assert seeds.dtype == output_index.dtype == torch.int64
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if bitmask is not None:
        assert bitmask.dtype == torch.int32
        assert bitmask.shape == (num_rows, -(-vocabulary // 32))
        assert bitmask.stride(1) == 1
    ids = torch.empty(num_rows, dtype=torch.int64)
    logprobs = torch.empty(num_rows, dtype=torch.float32)
    launch(
        sample_rows,
        num_rows,
        4.0 * num_rows * vocabulary,
        12 * (vocabulary + CHUNK) + 8 * (2048 + LANES) + 4 * CHUNK,
        logits.data_ptr(),
        4 * logits.stride(0),
        0 if bitmask is None else bitmask.data_ptr(),
        0 if bitmask is None else 4 * bitmask.stride(0),
        vocabulary,
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        seeds.data_ptr(),
        output_index.data_ptr(),
        ids.data_ptr(),
        logprobs.data_ptr(),
    )
    return ids, logprobs
