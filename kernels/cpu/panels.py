"""What products multiply by, weights [N, K], as panels: of 32 outputs, each words [K / 2, 4 or 8, 32].

A panel follows the other, so a thread reads those it takes from front to back, which one row needs at the speed of
memory. Owns how weights are packed so, how int8 weights are rounded and stored, and how a row is taken out again.
"""

from __future__ import annotations

import numpy as np

from aiexport_edge.kernels.cpu.dot import COLUMNS
from aiexport_edge.kernels.cpu.jit import kernel
from aiexport_edge.kernels.cpu.memory import (
    BFLOAT16,
    get_float32,
    get_int32,
    get_int64,
    load,
    narrow,
    set_float32,
    widen,
)
from aiexport_edge.kernels.cpu.simd import LANES, absolute, max_lanes, maximum, splat
from aiexport_edge.kernels.cpu.units import begin, end, next_unit
from aiexport_edge.kernels.cpu.words import quantize_unsigned, set_int32, transpose_words

OFFSET = 128  # of stored weights in int8


@kernel
def pack_words(
    control: int, scratch: int, num_units: int, weight: int, row_bytes: int, num_outputs: int, depth: int, target: int
) -> None:
    """Words [num_outputs, depth] to panels; outputs past the last are zero."""
    unit = begin(control)
    while unit < num_units:
        panel = target + unit * depth * 4 * COLUMNS
        for column in range(0, COLUMNS, LANES):
            first = unit * COLUMNS + column
            for word in range(0, depth, LANES):
                transpose_words(
                    weight + first * row_bytes + 4 * word,
                    row_bytes,
                    num_outputs - first,
                    depth - word,
                    panel + 4 * (word * COLUMNS + column),
                    4 * COLUMNS,
                )
        unit = next_unit(control)
    end(control)


@kernel
def quantize_weight(
    control: int, scratch: int, num_units: int, weight: int, dtype: int, width: int, out: int, scales: int
) -> None:
    """`quantization.quantize_int8` of a row a unit, with 128 added."""
    item = 4 if dtype == 0 else 2
    padded = (width + LANES - 1) // LANES * LANES
    wide = scratch
    unit = begin(control)
    while unit < num_units:
        widen(dtype, weight + unit * width * item, wide, width)
        largest = splat(np.float32(1e-30))
        for i in range(0, padded, LANES):
            largest = maximum(absolute(load(wide + 4 * i)), largest)
        scale = max_lanes(largest) / np.float32(127.0)
        set_float32(scales, unit, scale)
        for i in range(0, padded, LANES):
            quantize_unsigned(wide + 4 * i, scale, out + unit * width + i, width - i)
        unit = next_unit(control)
    end(control)


@kernel
def gather_outputs(
    control: int,
    scratch: int,
    num_units: int,
    ids: int,
    panels: int,
    depth: int,
    scales: int,
    width: int,
    out: int,
    out_dtype: int,
) -> None:
    """The weights of the outputs `ids`, as products have them; `scales` 0: they are bfloat16."""
    item = 4 if out_dtype == 0 else 2
    wide = scratch + 4 * depth
    unit = begin(control)
    while unit < num_units:
        output = get_int64(ids, unit)
        first = panels + 4 * (output // COLUMNS * COLUMNS * depth + output % COLUMNS)
        if scales == 0:
            for word in range(depth):
                set_int32(scratch, word, get_int32(first, word * COLUMNS))
            widen(BFLOAT16, scratch, wide, width)
        else:
            scale = get_float32(scales, output)
            for word in range(depth):
                four = get_int32(first, word * COLUMNS)
                for byte in range(4):
                    set_float32(wide, 4 * word + byte, scale * np.float32((four >> (8 * byte) & 255) - OFFSET))
        narrow(out_dtype, wide, out + unit * width * item, width)
        unit = next_unit(control)
    end(control)
