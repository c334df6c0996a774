"""The arithmetic of attention on a tile of query rows: products, one step of online softmax, merging of splits.

What happens to a row is a chain of fused multiply-adds and exponentials that depends on that row and its keys alone,
not on the rows beside it. Scores are in units of log2, so weights are powers of two. Knows nothing of pages.

A row's state: sum of weighted values (`width` floats), of weights (16 partial sums), largest score (1 of 16 floats).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]

from aiexport_edge.kernels.cpu import building, memory, simd
from aiexport_edge.kernels.cpu.jit import inner
from aiexport_edge.kernels.cpu.memory import get_float32, load, set_float32, store
from aiexport_edge.kernels.cpu.simd import (
    LANES,
    add,
    exp2,
    fma,
    keep_lanes,
    max_lanes,
    maximum,
    multiply,
    splat,
    sum_lanes,
)

BLOCK = 64
COLUMNS = 32  # of one product
LOWEST = -1.0e30  # below every score, and finite: exp2(LOWEST - LOWEST) is 1

# Rows of the register tile: 32 columns are 2 of 32 registers with AVX-512, 4 of 16 with AVX2.
MANY_ROWS = 8 if "avx512f" in simd.FEATURES else 2


def _product(num_rows: int, *, from_zero: bool) -> Callable[..., None]:
    """out[num_rows, 32] (+)= left[num_rows, depth] @ right[depth, 32], float32, strides in bytes."""

    @simd.operation(simd.none, *[simd.int64] * 7)
    def product(
        builder: Any,
        left: Any,
        left_stride: Any,
        right: Any,
        right_stride: Any,
        out: Any,
        out_stride: Any,
        depth: Any,
    ) -> None:
        form = simd.FLOATS

        def at(address: Any, stride: Any, row: int, column: int) -> Any:
            offset = builder.mul(stride, ir.Constant(stride.type, row))
            return builder.add(builder.add(address, offset), ir.Constant(address.type, 4 * column))

        cells = [(row, column) for row in range(num_rows) for column in range(0, COLUMNS, LANES)]
        sums = {}
        for cell in cells:
            start = simd.constant(form, 0.0) if from_zero else memory.read(builder, at(out, out_stride, *cell))
            sums[cell] = building.alloca_once_value(builder, start)
        with building.for_range(builder, depth) as loop:
            row_of_right = builder.add(right, builder.mul(right_stride, loop.index))
            rights = {
                column: memory.read(builder, builder.add(row_of_right, ir.Constant(right.type, 4 * column)))
                for column in range(0, COLUMNS, LANES)
            }
            for row in range(num_rows):
                item = memory.pointer(builder, at(left, left_stride, row, 0), simd.F32, loop.index)
                factor = simd.broadcast(builder, builder.load(item, align=4, typ=simd.F32), form)
                for column, values in rights.items():
                    place = sums[row, column]
                    builder.store(simd.fused(builder, factor, values, builder.load(place)), place)
        for cell in cells:
            builder.store(builder.load(sums[cell]), memory.pointer(builder, at(out, out_stride, *cell), form), align=4)

    function: Callable[..., None] = product
    return function


_set_many, _set_two, _set_one = (_product(rows, from_zero=True) for rows in (MANY_ROWS, 2, 1))
_add_many, _add_two, _add_one = (_product(rows, from_zero=False) for rows in (MANY_ROWS, 2, 1))


@inner
def score_rows(
    left: int, left_stride: int, right: int, right_stride: int, out: int, out_stride: int, rows: int, depth: int
) -> None:
    """out[rows, 32] = left @ right."""
    row = 0
    while row + MANY_ROWS <= rows:
        _set_many(left + row * left_stride, left_stride, right, right_stride, out + row * out_stride, out_stride, depth)
        row += MANY_ROWS
    while row + 2 <= rows:
        _set_two(left + row * left_stride, left_stride, right, right_stride, out + row * out_stride, out_stride, depth)
        row += 2
    if row < rows:
        _set_one(left + row * left_stride, left_stride, right, right_stride, out + row * out_stride, out_stride, depth)


@inner
def add_values(
    left: int, left_stride: int, right: int, right_stride: int, out: int, out_stride: int, rows: int, depth: int
) -> None:
    """out[rows, 32] += left @ right."""
    row = 0
    while row + MANY_ROWS <= rows:
        _add_many(left + row * left_stride, left_stride, right, right_stride, out + row * out_stride, out_stride, depth)
        row += MANY_ROWS
    while row + 2 <= rows:
        _add_two(left + row * left_stride, left_stride, right, right_stride, out + row * out_stride, out_stride, depth)
        row += 2
    if row < rows:
        _add_one(left + row * left_stride, left_stride, right, right_stride, out + row * out_stride, out_stride, depth)


@inner
def weigh(scores: int, num_vectors: int, low: int, high: int, state: int, width: int) -> None:
    """One step of online softmax: the row's scores become weights, its state is scaled to the new largest score."""
    largest = splat(np.float32(LOWEST))
    for i in range(num_vectors):
        v = load(scores + 64 * i)
        if low > 0 or high < BLOCK:
            v = keep_lanes(v, low - LANES * i, high - LANES * i)
            store(scores + 64 * i, v)
        largest = maximum(v, largest)
    before = get_float32(state, width + LANES)
    now = max(before, max_lanes(largest))
    shift = splat(-now)
    total = splat(np.float32(0.0))
    for i in range(num_vectors):
        weight = exp2(add(load(scores + 64 * i), shift))
        store(scores + 64 * i, weight)
        total = add(total, weight)
    sums = state + 4 * width
    if now > before:
        fade = exp2(splat(before - now))
        for i in range(0, width, LANES):
            store(state + 4 * i, multiply(load(state + 4 * i), fade))
        store(sums, fma(load(sums), fade, total))
        set_float32(state, width + LANES, now)
    else:
        store(sums, add(load(sums), total))


@inner
def clear(state: int, width: int, rows: int) -> None:
    """States of rows that have seen no key."""
    for row in range(rows):
        place = state + row * 4 * (width + 2 * LANES)
        for i in range(0, width + LANES, LANES):
            store(place + 4 * i, splat(np.float32(0.0)))
        store(place + 4 * (width + LANES), splat(np.float32(LOWEST)))


@inner
def merge(state: int, later: int, width: int, rows: int) -> None:
    """Take the states of the next split into those of the splits before it."""
    for row in range(rows):
        a = state + row * 4 * (width + 2 * LANES)
        b = later + row * 4 * (width + 2 * LANES)
        before, after = get_float32(a, width + LANES), get_float32(b, width + LANES)
        now = max(before, after)
        fade_a, fade_b = exp2(splat(before - now)), exp2(splat(after - now))
        for i in range(0, width + LANES, LANES):
            store(a + 4 * i, fma(load(a + 4 * i), fade_a, multiply(load(b + 4 * i), fade_b)))
        set_float32(a, width + LANES, now)


@inner
def finish(state: int, width: int, scratch: int) -> None:
    """The attention of one row, from its state."""
    scale = splat(np.float32(1.0) / sum_lanes(load(state + 4 * width)))
    zero = splat(np.float32(0.0))  # turns -0 into 0: whether a masked key was added to it must not show
    for i in range(0, width, LANES):
        store(scratch + 4 * i, fma(load(state + 4 * i), scale, zero))


def state_size(width: int) -> int:
    """Bytes of a row's state."""
    return 4 * (width + 2 * LANES)
