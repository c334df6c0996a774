"""Low-rank adapters. A unit of work is a few tokens; one without an adapter costs nothing.

Tokens come sorted by their adapters. Those that follow each other in a unit and have the same one read its factors
together, two by two: factors are what a decode waits for. A token's sums have the same order whatever is beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.memory import (
    get_float32,
    get_int32,
    get_int64,
    load,
    load_either,
    load_first_either,
    narrow,
    prefetch,
    set_float32,
    store,
    widen,
)
from aiexport_edge.kernels.cpu.simd import LANES, fma, splat, sum_lanes
from aiexport_edge.kernels.cpu.units import DTYPES, begin, end, next_unit
from aiexport_edge.kernels.threads import launch

if TYPE_CHECKING:
    from aiexport_edge.kernels.lora import LoraTable

ROWS = 4  # of `a` and `b`, at a time; a table's ranks are padded to a multiple of it
MOST_TOKENS = 8  # of a unit
NOTHING = 0  # to ask for
LINE_MASK = 31  # bfloat16 of a cache line, less one
COLUMNS = 1024  # of the output, at a time: what is added up stays in the first-level cache


@inner
def _dot_one(half: int, x: int, a: int, out: int, rank: int, width: int, then: int, then_stride: int) -> None:
    """out[r] = x · row r of a, for `rank` rows `width` long; x is float32, padded with zeros.

    Rows are asked for some time before they are read, and at the end those at `then`, `then_stride` bytes apart, which
    come next. NOTHING: they are all here.
    """
    size = 4 - 2 * half
    rest = width % LANES
    whole = width - rest
    for row in range(0, rank, ROWS):
        first = a + size * row * width
        second, third, fourth = first + size * width, first + 2 * size * width, first + 3 * size * width
        zero = splat(np.float32(0.0))
        sum_0, sum_1, sum_2, sum_3 = zero, zero, zero, zero
        ahead, stride = fourth + size * width, size * width
        if row + ROWS >= rank:
            ahead, stride = then, then_stride
        for i in range(0, whole, LANES):
            if then != NOTHING and i & LINE_MASK == 0:
                line = ahead + size * i
                prefetch(line)
                prefetch(line + stride)
                prefetch(line + 2 * stride)
                prefetch(line + 3 * stride)
            factor = load(x + 4 * i)
            sum_0 = fma(factor, load_either(half, first + size * i), sum_0)
            sum_1 = fma(factor, load_either(half, second + size * i), sum_1)
            sum_2 = fma(factor, load_either(half, third + size * i), sum_2)
            sum_3 = fma(factor, load_either(half, fourth + size * i), sum_3)
        if rest:
            factor = load(x + 4 * whole)
            sum_0 = fma(factor, load_first_either(half, first + size * whole, rest), sum_0)
            sum_1 = fma(factor, load_first_either(half, second + size * whole, rest), sum_1)
            sum_2 = fma(factor, load_first_either(half, third + size * whole, rest), sum_2)
            sum_3 = fma(factor, load_first_either(half, fourth + size * whole, rest), sum_3)
        set_float32(out, row, sum_lanes(sum_0))
        set_float32(out, row + 1, sum_lanes(sum_1))
        set_float32(out, row + 2, sum_lanes(sum_2))
        set_float32(out, row + 3, sum_lanes(sum_3))


@inner
def _dot_two(
    half: int,
    x: int,
    y: int,
    a: int,
    out: int,
    second_out: int,
    rank: int,
    width: int,
    then: int,
    then_stride: int,
) -> None:
    """`_dot_one` of two rows, x and y."""
    size = 4 - 2 * half
    rest = width % LANES
    whole = width - rest
    for row in range(0, rank, ROWS):
        first = a + size * row * width
        second, third, fourth = first + size * width, first + 2 * size * width, first + 3 * size * width
        zero = splat(np.float32(0.0))
        sum_0, sum_1, sum_2, sum_3 = zero, zero, zero, zero
        other_0, other_1, other_2, other_3 = zero, zero, zero, zero
        ahead, stride = fourth + size * width, size * width
        if row + ROWS >= rank:
            ahead, stride = then, then_stride
        for i in range(0, whole, LANES):
            if then != NOTHING and i & LINE_MASK == 0:
                line = ahead + size * i
                prefetch(line)
                prefetch(line + stride)
                prefetch(line + 2 * stride)
                prefetch(line + 3 * stride)
            factor, other = load(x + 4 * i), load(y + 4 * i)
            lanes = load_either(half, first + size * i)
            sum_0, other_0 = fma(factor, lanes, sum_0), fma(other, lanes, other_0)
            lanes = load_either(half, second + size * i)
            sum_1, other_1 = fma(factor, lanes, sum_1), fma(other, lanes, other_1)
            lanes = load_either(half, third + size * i)
            sum_2, other_2 = fma(factor, lanes, sum_2), fma(other, lanes, other_2)
            lanes = load_either(half, fourth + size * i)
            sum_3, other_3 = fma(factor, lanes, sum_3), fma(other, lanes, other_3)
        if rest:
            factor, other = load(x + 4 * whole), load(y + 4 * whole)
            lanes = load_first_either(half, first + size * whole, rest)
            sum_0, other_0 = fma(factor, lanes, sum_0), fma(other, lanes, other_0)
            lanes = load_first_either(half, second + size * whole, rest)
            sum_1, other_1 = fma(factor, lanes, sum_1), fma(other, lanes, other_1)
            lanes = load_first_either(half, third + size * whole, rest)
            sum_2, other_2 = fma(factor, lanes, sum_2), fma(other, lanes, other_2)
            lanes = load_first_either(half, fourth + size * whole, rest)
            sum_3, other_3 = fma(factor, lanes, sum_3), fma(other, lanes, other_3)
        set_float32(out, row, sum_lanes(sum_0))
        set_float32(out, row + 1, sum_lanes(sum_1))
        set_float32(out, row + 2, sum_lanes(sum_2))
        set_float32(out, row + 3, sum_lanes(sum_3))
        set_float32(second_out, row, sum_lanes(other_0))
        set_float32(second_out, row + 1, sum_lanes(other_1))
        set_float32(second_out, row + 2, sum_lanes(other_2))
        set_float32(second_out, row + 3, sum_lanes(other_3))


@inner
def _add_one(
    half: int,
    factors: int,
    b: int,
    b_stride: int,
    out: int,
    rank: int,
    width: int,
    then: int,
    then_stride: int,
) -> None:
    """out += the sum of `rank` rows of b, `b_stride` bytes apart and `width` long, each times its factor."""
    size = 4 - 2 * half
    for row in range(0, rank, ROWS):
        first = b + row * b_stride
        second, third, fourth = first + b_stride, first + 2 * b_stride, first + 3 * b_stride
        factor_0, factor_1 = splat(get_float32(factors, row)), splat(get_float32(factors, row + 1))
        factor_2, factor_3 = splat(get_float32(factors, row + 2)), splat(get_float32(factors, row + 3))
        ahead, stride = fourth + b_stride, b_stride
        if row + ROWS >= rank:
            ahead, stride = then, then_stride
        for i in range(0, width, LANES):
            if then != NOTHING and i & LINE_MASK == 0:
                line = ahead + size * i
                prefetch(line)
                prefetch(line + stride)
                prefetch(line + 2 * stride)
                prefetch(line + 3 * stride)
            total = fma(factor_0, load_either(half, first + size * i), load(out + 4 * i))
            total = fma(factor_1, load_either(half, second + size * i), total)
            total = fma(factor_2, load_either(half, third + size * i), total)
            store(out + 4 * i, fma(factor_3, load_either(half, fourth + size * i), total))


@inner
def _add_two(
    half: int,
    factors: int,
    others: int,
    b: int,
    b_stride: int,
    out: int,
    second_out: int,
    rank: int,
    width: int,
    then: int,
    then_stride: int,
) -> None:
    """`_add_one` of two rows."""
    size = 4 - 2 * half
    for row in range(0, rank, ROWS):
        first = b + row * b_stride
        second, third, fourth = first + b_stride, first + 2 * b_stride, first + 3 * b_stride
        factor_0, factor_1 = splat(get_float32(factors, row)), splat(get_float32(factors, row + 1))
        factor_2, factor_3 = splat(get_float32(factors, row + 2)), splat(get_float32(factors, row + 3))
        other_0, other_1 = splat(get_float32(others, row)), splat(get_float32(others, row + 1))
        other_2, other_3 = splat(get_float32(others, row + 2)), splat(get_float32(others, row + 3))
        ahead, stride = fourth + b_stride, b_stride
        if row + ROWS >= rank:
            ahead, stride = then, then_stride
        for i in range(0, width, LANES):
            if then != NOTHING and i & LINE_MASK == 0:
                line = ahead + size * i
                prefetch(line)
                prefetch(line + stride)
                prefetch(line + 2 * stride)
                prefetch(line + 3 * stride)
            lanes = load_either(half, first + size * i)
            total, second_total = fma(factor_0, lanes, load(out + 4 * i)), fma(other_0, lanes, load(second_out + 4 * i))
            lanes = load_either(half, second + size * i)
            total, second_total = fma(factor_1, lanes, total), fma(other_1, lanes, second_total)
            lanes = load_either(half, third + size * i)
            total, second_total = fma(factor_2, lanes, total), fma(other_2, lanes, second_total)
            lanes = load_either(half, fourth + size * i)
            store(out + 4 * i, fma(factor_3, lanes, total))
            store(second_out + 4 * i, fma(other_3, lanes, second_total))


@kernel
def lora_rows(
    control: int,
    scratch: int,
    num_units: int,
    out: int,
    x: int,
    slots: int,
    order: int,
    unit_tokens: int,
    num_tokens: int,
    ranks: int,
    a: int,
    b: int,
    ends: int,
    num_parts: int,
    max_rank: int,
    half: int,
    dtype: int,
    in_features: int,
    out_features: int,
) -> None:
    """`unit_tokens` tokens after the other of `order`: their rows of `out`, which are read and written."""
    item, size = 4, 4 - 2 * half
    if dtype != 0:
        item = 2
    row_bytes = 4 * ((in_features + LANES - 1) // LANES * LANES)
    totals = scratch + MOST_TOKENS * row_bytes
    hidden = totals + 4 * MOST_TOKENS * COLUMNS
    b_stride = size * out_features
    unit = begin(control)
    while unit < num_units:
        place, stop = unit * unit_tokens, min((unit + 1) * unit_tokens, num_tokens)
        while place < stop:
            first = place
            slot = get_int32(slots, get_int32(order, first))
            place += 1
            while place < stop and get_int32(slots, get_int32(order, place)) == slot:
                place += 1
            rank = 0
            if slot >= 0:
                rank = (get_int32(ranks, slot) + ROWS - 1) // ROWS * ROWS
            if rank > 0:
                count = place - first
                for i in range(count):
                    token = get_int32(order, first + i)
                    widen(dtype, x + token * in_features * item, scratch + i * row_bytes, in_features)
                start = 0
                for part in range(num_parts):
                    part_end = get_int64(ends, part)
                    rows = a + size * (slot * num_parts + part) * max_rank * in_features
                    factors = b + size * (slot * max_rank * out_features + start)
                    asked = factors
                    for i in range(0, count, 2):
                        left, low = scratch + i * row_bytes, hidden + 4 * i * max_rank
                        if i + 1 < count:
                            right, other_low = left + row_bytes, low + 4 * max_rank
                            _dot_two(half, left, right, rows, low, other_low, rank, in_features, asked, b_stride)
                        else:
                            _dot_one(half, left, rows, low, rank, in_features, asked, b_stride)
                        asked = NOTHING
                    for column in range(start, part_end, COLUMNS):
                        width = min(COLUMNS, part_end - column)
                        asked, stride = factors + size * width, b_stride
                        if column + width == part_end:
                            asked, stride = rows + size * max_rank * in_features, size * in_features
                        for i in range(count):
                            place_of = (get_int32(order, first + i) * out_features + column) * item
                            widen(dtype, out + place_of, totals + 4 * i * COLUMNS, width)
                        for i in range(0, count, 2):
                            total, low = totals + 4 * i * COLUMNS, hidden + 4 * i * max_rank
                            if i + 1 < count:
                                other, other_low = total + 4 * COLUMNS, low + 4 * max_rank
                                _add_two(
                                    half, low, other_low, factors, b_stride, total, other, rank, width, asked, stride
                                )
                            else:
                                _add_one(half, low, factors, b_stride, total, rank, width, asked, stride)
                            asked = NOTHING
                        for i in range(count):
                            place_of = (get_int32(order, first + i) * out_features + column) * item
                            narrow(dtype, totals + 4 * i * COLUMNS, out + place_of, width)
                        factors += size * width
                    start = part_end
        unit = next_unit(control)
    end(control)


def add_lora(out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, order: torch.Tensor, table: LoraTable) -> None:
    """See `aiexport_edge.kernels.lora`. A sum's order depends on the rank alone."""
    _, num_parts, max_rank, in_features = table.a.shape
    num_tokens, out_features = out.shape
    assert out.is_contiguous()
    assert slots.dtype == order.dtype == torch.int32
    assert table.a.dtype == table.b.dtype
    x = x.contiguous()
    unit_tokens = min(MOST_TOKENS, max(2, num_tokens // 4))  # a few units at least, for several threads
    launch(
        lora_rows,
        -(-num_tokens // unit_tokens),
        0.02 * num_tokens * max_rank * (num_parts * in_features + out_features),
        4 * MOST_TOKENS * (in_features + LANES + COLUMNS + max_rank),
        out.data_ptr(),
        x.data_ptr(),
        slots.data_ptr(),
        order.data_ptr(),
        unit_tokens,
        num_tokens,
        table.ranks.data_ptr(),
        table.a.data_ptr(),
        table.b.data_ptr(),
        table.host_ends.data_ptr(),
        num_parts,
        max_rank,
        int(table.a.dtype == torch.bfloat16),
        DTYPES[out.dtype],
        in_features,
        out_features,
    )
