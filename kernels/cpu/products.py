"""Tiles of rows times panels of weights, for processors that multiply bfloat16 pairs or int8 quadruples but have no
tiles of their own (AMX).

A unit of work is a panel with all rows. int8 rows have a scale per 128 inputs (`row_tiles.py`), int8 weights one per
output (`panels.py`). A row's bits do not depend on the rows beside it (`dot.py`).
"""

from __future__ import annotations

import numpy as np

from aiexport_edge.kernels.cpu.dot import (
    COLUMNS,
    HAS_BFLOAT16,
    HAS_INT8,
    PREFETCH_BYTES,
    Tile,
    bfloat16_tile,
    int8_tile,
)
from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.memory import get_int64, load, narrow, store
from aiexport_edge.kernels.cpu.row_tiles import tile_rows
from aiexport_edge.kernels.cpu.simd import LANES, add, multiply, splat
from aiexport_edge.kernels.cpu.units import begin, end, next_unit

GROUP = 128  # inputs of a row that share a scale


@inner
def _no_float_tile(left: int, right: int, out: int, depth: int, ahead: int, step: int) -> None:
    """Stands for the product on processors that do not multiply bfloat16 pairs; never called there."""


@inner
def _no_int_tile(left: int, right: int, out: int, depth: int, factors: int, ahead: int, step: int) -> None:
    """Stands for the product on processors that do not multiply int8 quadruples; never called there."""


def _float(rows: int) -> Tile:
    return bfloat16_tile(rows) if HAS_BFLOAT16 else _no_float_tile


def _int(rows: int) -> Tile:
    return int8_tile(rows) if HAS_INT8 else _no_int_tile


_float_1, _float_2, _float_3, _float_4, _float_5, _float_6 = (_float(rows) for rows in range(1, 7))
_float_7, _float_8, _float_9, _float_10, _float_11, _float_12 = (_float(rows) for rows in range(7, 13))
_int_1, _int_2, _int_3, _int_4, _int_5, _int_6 = (_int(rows) for rows in range(1, 7))
_int_7, _int_8, _int_9, _int_10, _int_11, _int_12 = (_int(rows) for rows in range(7, 13))


@inner
def _float_tile(rows: int, left: int, right: int, out: int, depth: int, ahead: int, step: int) -> None:
    if rows == 12:
        _float_12(left, right, out, depth, ahead, step)
    elif rows == 1:
        _float_1(left, right, out, depth, ahead, step)
    elif rows == 2:
        _float_2(left, right, out, depth, ahead, step)
    elif rows == 3:
        _float_3(left, right, out, depth, ahead, step)
    elif rows == 4:
        _float_4(left, right, out, depth, ahead, step)
    elif rows == 5:
        _float_5(left, right, out, depth, ahead, step)
    elif rows == 6:
        _float_6(left, right, out, depth, ahead, step)
    elif rows == 7:
        _float_7(left, right, out, depth, ahead, step)
    elif rows == 8:
        _float_8(left, right, out, depth, ahead, step)
    elif rows == 9:
        _float_9(left, right, out, depth, ahead, step)
    elif rows == 10:
        _float_10(left, right, out, depth, ahead, step)
    else:
        _float_11(left, right, out, depth, ahead, step)


@inner
def _int_tile(rows: int, left: int, right: int, out: int, depth: int, factors: int, ahead: int, step: int) -> None:
    if rows == 12:
        _int_12(left, right, out, depth, factors, ahead, step)
    elif rows == 1:
        _int_1(left, right, out, depth, factors, ahead, step)
    elif rows == 2:
        _int_2(left, right, out, depth, factors, ahead, step)
    elif rows == 3:
        _int_3(left, right, out, depth, factors, ahead, step)
    elif rows == 4:
        _int_4(left, right, out, depth, factors, ahead, step)
    elif rows == 5:
        _int_5(left, right, out, depth, factors, ahead, step)
    elif rows == 6:
        _int_6(left, right, out, depth, factors, ahead, step)
    elif rows == 7:
        _int_7(left, right, out, depth, factors, ahead, step)
    elif rows == 8:
        _int_8(left, right, out, depth, factors, ahead, step)
    elif rows == 9:
        _int_9(left, right, out, depth, factors, ahead, step)
    elif rows == 10:
        _int_10(left, right, out, depth, factors, ahead, step)
    else:
        _int_11(left, right, out, depth, factors, ahead, step)


@inner
def find_ahead(control: int, unit: int, num_units: int, panels: int, panel_bytes: int, num_rows: int, most: int) -> int:
    """What to ask memory for during this panel: with one tile of rows, what comes soon; with several, the next panel,
    a part of it during each tile, since all tiles but the first find their own in a cache. The threads take turns, so
    the next panel is as many further as there are threads at work.
    """
    if num_rows <= most:
        return panels + unit * panel_bytes + PREFETCH_BYTES
    following: int = min(unit + get_int64(control, 1), num_units - 1)
    return panels + following * panel_bytes


@inner
def ahead_step(num_rows: int, most: int) -> int:
    """Bytes to ask for with each word of the depth."""
    tiles = (num_rows + most - 1) // most
    return (4 * COLUMNS + tiles - 1) // tiles


@inner
def write_tile(
    sums: int, rows: int, scales: int, bias: int, out: int, out_dtype: int, out_bytes: int, columns: int
) -> None:
    """float32 [rows, 32] times scales (0: none) plus bias (0: none) to the result's rows, `columns` of them."""
    for row in range(rows):
        for i in range(0, COLUMNS, LANES):
            place = sums + 4 * (row * COLUMNS + i)
            value = load(place)
            if scales != 0:
                value = multiply(value, load(scales + 4 * i))
            if bias != 0:
                value = add(value, load(bias + 4 * i))
            store(place, value)
        narrow(out_dtype, sums + 4 * row * COLUMNS, out + row * out_bytes, columns)


@kernel
def multiply_bfloat16(
    control: int,
    scratch: int,
    num_units: int,
    tiles: int,
    num_rows: int,
    panels: int,
    depth: int,
    bias: int,
    out: int,
    out_dtype: int,
    num_outputs: int,
) -> None:
    """Tiles of rows times panels, to [num_rows, num_outputs]."""
    most = tile_rows(num_rows)
    item = 4 if out_dtype == 0 else 2
    step = ahead_step(num_rows, most)
    unit = begin(control)
    while unit < num_units:
        first = unit * COLUMNS
        right = panels + first * depth * 4
        ahead = find_ahead(control, unit, num_units, panels, 4 * COLUMNS * depth, num_rows, most)
        for row in range(0, num_rows, most):
            rows = min(most, num_rows - row)
            _float_tile(rows, tiles + row * depth * 4, right, scratch, depth, ahead, step)
            ahead += step * depth
            place = out + (row * num_outputs + first) * item
            own_bias = bias + 4 * first if bias != 0 else 0
            columns = min(COLUMNS, num_outputs - first)
            write_tile(scratch, rows, 0, own_bias, place, out_dtype, num_outputs * item, columns)
        unit = next_unit(control)
    end(control)


@kernel
def multiply_int8(
    control: int,
    scratch: int,
    num_units: int,
    tiles: int,
    factors: int,
    num_rows: int,
    panels: int,
    depth: int,
    scales: int,
    bias: int,
    out: int,
    out_dtype: int,
    num_outputs: int,
) -> None:
    """Tiles of quantized rows times panels, to [num_rows, num_outputs]."""
    most = tile_rows(num_rows)
    item = 4 if out_dtype == 0 else 2
    words = GROUP // 4
    groups = (depth + words - 1) // words
    step = ahead_step(num_rows, most)
    unit = begin(control)
    while unit < num_units:
        first = unit * COLUMNS
        ahead = find_ahead(control, unit, num_units, panels, 4 * COLUMNS * depth, num_rows, most)
        for row in range(0, num_rows, most):
            rows = min(most, num_rows - row)
            for i in range(0, rows * COLUMNS, LANES):
                store(scratch + 4 * i, splat(np.float32(0.0)))
            for group in range(groups):
                left = tiles + (row * depth + group * words * rows) * 4
                right = panels + (first * depth + group * words * COLUMNS) * 4
                facts = factors + (row * groups + group * rows) * 8
                own = min(words, depth - group * words)
                _int_tile(rows, left, right, scratch, own, facts, ahead, step)
                ahead += step * own
            place = out + (row * num_outputs + first) * item
            own_bias = bias + 4 * first if bias != 0 else 0
            columns = min(COLUMNS, num_outputs - first)
            write_tile(scratch, rows, scales + 4 * first, own_bias, place, out_dtype, num_outputs * item, columns)
        unit = next_unit(control)
    end(control)
