"""What products are given, rows [M, K], as tiles: of up to 12 rows, each words [K / 2 or 4, rows].

Owns how rows are cut into tiles, arranged and rounded: to int8 with a scale for each group of inputs, since a row's
largest values would drown the others. Knows no weights.
"""

from __future__ import annotations

import numpy as np

from aiexport_edge.kernels.cpu.dot import MOST_ROWS
from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.memory import (
    BFLOAT16,
    get_float32,
    get_int32,
    get_int64,
    load,
    narrow,
    set_float32,
    store,
    widen,
)
from aiexport_edge.kernels.cpu.simd import LANES, absolute, max_lanes, maximum, splat
from aiexport_edge.kernels.cpu.units import begin, end, next_unit
from aiexport_edge.kernels.cpu.words import arrange_words, quantize_lanes, set_int32


@inner
def tile_rows(num_rows: int) -> int:
    """Rows of all tiles but the last: as few tiles as can be, of about one size."""
    tiles = (num_rows + MOST_ROWS - 1) // MOST_ROWS
    return (num_rows + tiles - 1) // tiles


def rows_of(num_rows: int) -> int:
    """As `tile_rows` has it."""
    return -(-num_rows // -(-num_rows // MOST_ROWS))


@kernel
def arrange_rows(
    control: int, scratch: int, num_units: int, x: int, num_rows: int, row_bytes: int, depth: int, target: int
) -> None:
    """Words [num_rows, depth] to tiles. A unit is a tile."""
    most = tile_rows(num_rows)
    unit = begin(control)
    while unit < num_units:
        rows = min(most, num_rows - unit * most)
        source, tile = x + unit * most * row_bytes, target + unit * most * depth * 4
        for word in range(0, depth, LANES):
            arrange_words(source + 4 * word, row_bytes, rows, depth - word, tile + 4 * word * rows)
        unit = next_unit(control)
    end(control)


@kernel
def pad_rows(control: int, scratch: int, num_units: int, x: int, width: int, target: int) -> None:
    """Rows of an odd number of bfloat16, `width`, each with a zero behind it. A unit is a row."""
    unit = begin(control)
    while unit < num_units:
        widen(BFLOAT16, x + 2 * unit * width, scratch, width)  # padded with zeros
        narrow(BFLOAT16, scratch, target + 2 * unit * (width + 1), width + 1)
        unit = next_unit(control)
    end(control)


@kernel
def quantize_rows(
    control: int,
    scratch: int,
    num_units: int,
    x: int,
    dtype: int,
    num_rows: int,
    width: int,
    depth: int,
    group: int,
    offset: int,
    order: int,
    target: int,
    factors: int,
) -> None:
    """Rows of `width` numbers to tiles of int8 words, and what products want to know of each `group` of each row.

    That is int32 [rows], the sum of the rounded numbers times -`offset`, and float32 [rows], their scale. `order`:
    int64 [width], which number of a row comes where; 0: as they lie.
    """
    most = tile_rows(num_rows)
    groups = (width + group - 1) // group
    item = 4 if dtype == 0 else 2
    wide, words = scratch, scratch + 4 * (groups * group)
    unit = begin(control)
    while unit < num_units:
        rows = min(most, num_rows - unit * most)
        tile, facts = target + unit * most * depth * 4, factors + unit * most * groups * 8
        for row in range(rows):
            for i in range(width // LANES * LANES, groups * group, LANES):
                store(wide + 4 * i, splat(np.float32(0.0)))
            if order == 0:
                widen(dtype, x + (unit * most + row) * width * item, wide, width)
            else:
                widen(dtype, x + (unit * most + row) * width * item, words + group, width)
                for i in range(width):
                    set_float32(wide, i, get_float32(words + group, get_int64(order, i)))
            for number in range(groups):
                largest = splat(np.float32(1e-30))
                for i in range(number * group, (number + 1) * group, LANES):
                    largest = maximum(absolute(load(wide + 4 * i)), largest)
                peak = max_lanes(largest)
                total = 0
                for i in range(0, group, LANES):
                    total += quantize_lanes(wide + 4 * (number * group + i), np.float32(127.0) / peak, words + i)
                for word in range(min(group // 4, depth - number * (group // 4))):
                    set_int32(tile, (number * (group // 4) + word) * rows + row, get_int32(words, word))
                set_int32(facts + 8 * number * rows, row, -offset * total)
                set_float32(facts + 8 * number * rows, rows + row, peak / np.float32(127.0))
        unit = next_unit(control)
    end(control)
