"""The arithmetic of attention on bfloat16 keys and values, in the instruction that multiplies pairs of them.

As `attention_rows`, with half the memory to go through and twice the products at a time: keys become words [head_dim /
2, 64] of two neighbours, values words [32, head_dim] of two positions, and the weights are rounded to bfloat16 before
they meet the values and before they are added up. Chains and blocks are the same, so a row's bits depend on it and its
keys alone. Where the processor lacks the instruction, nothing here is called.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from aiexport_edge.kernels.cpu import dot
from aiexport_edge.kernels.cpu.attention_rows import BLOCK, COLUMNS, LOWEST
from aiexport_edge.kernels.cpu.jit import inner
from aiexport_edge.kernels.cpu.memory import get_float32, get_int32, get_int64, load, prefetch, set_float32, store
from aiexport_edge.kernels.cpu.simd import LANES, add, exp2, fma, keep_lanes, max_lanes, maximum, multiply, splat
from aiexport_edge.kernels.cpu.words import gather_columns, pair_rows, set_int32, store_rounded

CACHE_LINE = 64


@inner
def _unavailable(
    left: int,
    row_stride: int,
    depth_stride: int,
    right: int,
    right_stride: int,
    out: int,
    out_stride: int,
    depth: int,
    start: int,
) -> None:
    """Stands for the product on other processors."""


def _tile(num_rows: int) -> Callable[..., None]:
    return dot.pair_tile(num_rows) if dot.HAS_BFLOAT16 else _unavailable


_eight, _two, _one = _tile(8), _tile(2), _tile(1)


@inner
def _multiply(
    left: int,
    row_stride: int,
    depth_stride: int,
    right: int,
    right_stride: int,
    out: int,
    out_stride: int,
    rows: int,
    depth: int,
    start: int,
) -> None:
    """out[rows, 32] (+)= left @ right."""
    row = 0
    while row + 8 <= rows:
        place, result = left + row * row_stride, out + row * out_stride
        _eight(place, row_stride, depth_stride, right, right_stride, result, out_stride, depth, start)
        row += 8
    while row + 2 <= rows:
        place, result = left + row * row_stride, out + row * out_stride
        _two(place, row_stride, depth_stride, right, right_stride, result, out_stride, depth, start)
        row += 2
    if row < rows:
        place, result = left + row * row_stride, out + row * out_stride
        _one(place, row_stride, depth_stride, right, right_stride, result, out_stride, depth, start)


@inner
def _unavailable_rows(addresses: int, offset: int, left: int, vectors: int, out: int) -> None:
    """Stands for the product on other processors."""


@inner
def _unavailable_pairs(
    weights: int, weights_stride: int, addresses: int, offset: int, out: int, out_stride: int, depth: int
) -> None:
    """Stands for the product on other processors."""


_dot_rows: Callable[..., None] = dot.dot_rows if dot.HAS_BFLOAT16 else _unavailable_rows
_add_one, _add_two, _add_four = (dot.add_pairs(rows) if dot.HAS_BFLOAT16 else _unavailable_pairs for rows in (1, 2, 4))


@inner
def ask_for(places: int, start: int, end: int, row_bytes: int) -> None:
    """Prefetch the keys and values of places start .. end - 1 of a block."""
    for place in range(start, end):
        for line in range(0, row_bytes, CACHE_LINE):
            prefetch(get_int64(places, place) + line)
            prefetch(get_int64(places, BLOCK + place) + line)


@inner
def attend_block_in_place(
    here: int,
    count: int,
    following: int,
    next_count: int,
    head_dim: int,
    queries: int,
    rows: int,
    group: int,
    high: int,
    window: int,
    factor: float,
    state: int,
    scratch: int,
) -> None:
    """`attend_block` for so few rows that arranging keys and values costs more than it saves.

    `queries` are bfloat16 rows as they are. The places past `count` are those of the last key, up to 64.
    """
    state_row = 4 * (head_dim + 2 * LANES)
    num_vectors = (count + LANES - 1) // LANES
    for row in range(rows):
        for i in range(num_vectors):
            if row == 0:  # a few lines at a time, keys now and values later: more than the processor can hold stall it
                for place in range(LANES * i, min(LANES * (i + 1), next_count)):
                    for line in range(0, 2 * head_dim, CACHE_LINE):
                        prefetch(get_int64(following, place) + line)
            out = scratch + 4 * (row * BLOCK + i * LANES)
            _dot_rows(here + 8 * LANES * i, 0, queries + 2 * row * head_dim, head_dim // 32, out)
        end = high + row // group
        low = end - window if window > 0 else 0
        weigh(scratch + 4 * row * BLOCK, num_vectors, low, end, factor, state + row * state_row, head_dim)
    pairs = (count + 1) // 2
    values = here + 8 * BLOCK
    for column in range(0, head_dim, COLUMNS):
        for place in range(next_count):
            prefetch(get_int64(following, BLOCK + place) + 2 * column)
        row = 0
        while row < rows:
            weights, out = scratch + 4 * row * BLOCK, state + row * state_row + 4 * column
            if rows - row >= 4:
                _add_four(weights, 4 * BLOCK, values, 2 * column, out, state_row, pairs)
                row += 4
            elif rows - row >= 2:
                _add_two(weights, 4 * BLOCK, values, 2 * column, out, state_row, pairs)
                row += 2
            else:
                _add_one(weights, 4 * BLOCK, values, 2 * column, out, state_row, pairs)
                row += 1


@inner
def copy_words(source: int, count: int, target: int) -> None:
    """`count` 32-bit words."""
    for word in range(count):
        set_int32(target, word, get_int32(source, word))


@inner
def arrange_query(source: int, head_dim: int, target: int, row: int, rows: int) -> None:
    """A query's words into column `row` of words [head_dim / 2, rows]."""
    for word in range(head_dim // 2):
        set_int32(target, word * rows + row, get_int32(source, word))


@inner
def arrange_keys(places: int, head_dim: int, target: int) -> None:
    """Sixteen keys, at the addresses in `places`, into sixteen columns of words [head_dim / 2, 64]."""
    for i in range(0, head_dim, 2 * LANES):
        gather_columns(places, 2 * i, target + i // 2 * 4 * BLOCK, 4 * BLOCK)


@inner
def arrange_values(first: int, second: int, head_dim: int, target: int) -> None:
    """Two positions' values into a row of words [32, head_dim]."""
    for i in range(0, head_dim, 2 * LANES):
        pair_rows(first + 2 * i, second + 2 * i, target + 4 * i)


@inner
def score(queries: int, rows: int, keys: int, num_columns: int, head_dim: int, scores: int) -> None:
    """scores[rows, 64] = queries @ keys, `num_columns` of them."""
    for column in range(0, num_columns, COLUMNS):
        right, out = keys + 4 * column, scores + 4 * column
        _multiply(queries, 4, 4 * rows, right, 4 * BLOCK, out, 4 * BLOCK, rows, head_dim // 2, 0)


@inner
def add_values(weights: int, rows: int, values: int, count: int, head_dim: int, state: int, state_row: int) -> None:
    """state[rows, head_dim] += weights @ values; the weights of a row lie where its scores were."""
    for column in range(0, head_dim, COLUMNS):
        right, out = values + 4 * column, state + 4 * column
        _multiply(weights, 4 * BLOCK, 4, right, 4 * head_dim, out, state_row, rows, (count + 1) // 2, 1)


@inner
def weigh(scores: int, num_vectors: int, low: int, high: int, factor: float, state: int, width: int) -> None:
    """`attention_rows.weigh` of scores that are not scaled yet; the weights replace them as bfloat16."""
    largest, scale = splat(np.float32(LOWEST)), splat(np.float32(factor))
    for i in range(num_vectors):
        v = multiply(load(scores + 64 * i), scale)
        if low > 0 or high < BLOCK:
            v = keep_lanes(v, low - LANES * i, high - LANES * i)
        store(scores + 64 * i, v)
        largest = maximum(v, largest)
    before = get_float32(state, width + LANES)
    now = max(before, max_lanes(largest))
    shift = splat(-now)
    total = splat(np.float32(0.0))
    for i in range(num_vectors):
        total = add(total, store_rounded(scores + 32 * i, exp2(add(load(scores + 64 * i), shift))))
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
def attend_block(
    here: int,
    count: int,
    head_dim: int,
    queries: int,
    rows: int,
    group: int,
    high: int,
    window: int,
    factor: float,
    state: int,
    scratch: int,
) -> None:
    """One block for all rows of a tile, whose keys and values have been arranged in `scratch` past the scores."""
    state_row = 4 * (head_dim + 2 * LANES)
    columns = scratch + 4 * rows * BLOCK
    values = columns + 4 * (head_dim // 2) * BLOCK
    for place in range(0, count, 2):
        second = min(place + 1, count - 1)  # its weight is 0 where it is the first again
        target = values + place // 2 * 4 * head_dim
        arrange_values(get_int64(here, BLOCK + place), get_int64(here, BLOCK + second), head_dim, target)
    num_columns = (count + COLUMNS - 1) // COLUMNS * COLUMNS
    score(queries, rows, columns, num_columns, head_dim, scratch)
    for row in range(rows):
        end = high + row // group
        low = end - window if window > 0 else 0
        weigh(scratch + 4 * row * BLOCK, num_columns // LANES, low, end, factor, state + row * state_row, head_dim)
    add_values(scratch, rows, values, count, head_dim, state, state_row)
