"""Products with packed weights, for processors that multiply bfloat16 pairs or int8 quadruples but have no tiles (AMX).

    weights [N, K]  ->  panels of 32 outputs, each words [K / 2 or 4, 32], one after the other: a thread reads its
                        panels from front to back, which one row needs at the speed of memory
    rows    [M, K]  ->  tiles of up to 12 rows, each words [K / 2 or 4, rows]

A unit of work is a panel with all rows. int8 weights have one scale per output, are stored with 128 added, and meet
rows that are quantized per 128 inputs, since a row's largest values would drown the others. A row's bits do not depend
on the rows beside it (`dot.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from aiexport_edge.kernels.cpu.dot import (
    COLUMNS,
    HAS_BFLOAT16,
    HAS_INT8,
    MOST_ROWS,
    PREFETCH_BYTES,
    Tile,
    bfloat16_tile,
    int8_tile,
)
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
from aiexport_edge.kernels.cpu.simd import LANES, absolute, add, max_lanes, maximum, multiply, splat
from aiexport_edge.kernels.cpu.units import DTYPES, begin, end, next_unit
from aiexport_edge.kernels.cpu.words import (
    arrange_words,
    quantize_lanes,
    quantize_unsigned,
    set_int32,
    transpose_words,
)
from aiexport_edge.kernels.large_pages import allocate
from aiexport_edge.kernels.quantization import Int8Weight
from aiexport_edge.kernels.threads import empty, launch

GROUP = 128  # inputs of a row that share a scale
OFFSET = 128  # of stored weights in int8
PACKED_AT_ONCE = 1 << 22  # numbers


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
def tile_rows(num_rows: int) -> int:
    """Rows of all tiles but the last: as few tiles as can be, of about one size."""
    tiles = (num_rows + MOST_ROWS - 1) // MOST_ROWS
    return (num_rows + tiles - 1) // tiles


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
                    set_float32(wide, 4 * word + byte, scale * np.float32((four >> (8 * byte) & 255) - 128))
        narrow(out_dtype, wide, out + unit * width * item, width)
        unit = next_unit(control)
    end(control)


class PackedWeight:
    """A weight [N, K] in panels, as bfloat16 or, where `quantized`, as int8 with a scale per output."""

    def __init__(self, parts: Sequence[torch.Tensor], bias: torch.Tensor | None, *, quantized: bool) -> None:
        """parts [n, K], stacked the weight, on a CPU and in any float dtype; bias [N]."""
        if any(part.shape[0] % COLUMNS for part in parts[:-1]):
            parts = [torch.cat(list(parts))]
        self.num_outputs, self.width = sum(part.shape[0] for part in parts), parts[0].shape[1]
        self.quantized = quantized
        per_word = 4 if quantized else 2
        self._depth = -(-self.width // per_word)
        padded_outputs = -(-self.num_outputs // COLUMNS) * COLUMNS
        self._panels = allocate(padded_outputs * self._depth * 4)
        self._scales = torch.zeros(padded_outputs) if quantized else None
        self._bias = None
        if bias is not None:
            self._bias = torch.zeros(padded_outputs)
            self._bias[: self.num_outputs] = bias
        # A few megabytes at a time, so that what is converted does not lie in memory as a whole besides.
        step = max(1, PACKED_AT_ONCE // self.width // COLUMNS) * COLUMNS
        first = 0
        for part in parts:
            for rows in torch.split(part, step):
                self._pack(rows, first)
                first += rows.shape[0]

    @classmethod
    def of_codes(cls, weight: Int8Weight, bias: torch.Tensor | None) -> PackedWeight:
        """A weight that came in int8, with a scale per output."""
        packed = cls([weight.codes], bias, quantized=True)
        assert packed._scales is not None
        packed._scales[: packed.num_outputs] = weight.scales[:, 0]
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._panels.nbytes + sum(part.nbytes for part in (self._scales, self._bias) if part is not None)

    def _pack(self, rows: torch.Tensor, first: int) -> None:
        num_rows = rows.shape[0]
        rows = rows.to(torch.bfloat16) if self._scales is None else self._quantize_weight(rows, first)
        missing = self._depth * (4 if self.quantized else 2) - self.width
        rows = torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()
        launch(
            pack_words,
            -(-num_rows // COLUMNS),
            0.2 * rows.numel(),
            0,
            rows.data_ptr(),
            4 * self._depth,
            num_rows,
            self._depth,
            self._panels.data_ptr() + first * self._depth * 4,
        )

    def _quantize_weight(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """`quantize_int8` with 128 added, uint8; the scales go where they belong."""
        assert self._scales is not None
        if rows.dtype == torch.int8:  # rounded already
            return (rows.to(torch.int16) + OFFSET).to(torch.uint8)
        rows = rows.contiguous()
        out = torch.empty(rows.shape, dtype=torch.uint8)
        launch(
            quantize_weight,
            rows.shape[0],
            0.3 * rows.numel(),
            4 * (self.width + LANES),
            rows.data_ptr(),
            DTYPES[rows.dtype],
            self.width,
            out.data_ptr(),
            self._scales.data_ptr() + 4 * first,
        )
        return out

    def multiply(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x [M, K], bfloat16 unless the weight is quantized -> x Wᵀ + b [M, N] in `dtype`."""
        num_rows = x.shape[0]
        out = empty((num_rows, self.num_outputs), dtype)
        if num_rows == 0:
            return out
        x = x.contiguous()
        num_panels = -(-self.num_outputs // COLUMNS)
        bias = 0 if self._bias is None else self._bias.data_ptr()
        if self._scales is None:
            tiles = self._arrange(x)
            launch(
                multiply_bfloat16,
                num_panels,
                self._panels.nbytes * (0.04 + 0.005 * num_rows),
                4 * MOST_ROWS * COLUMNS,
                tiles.data_ptr(),
                num_rows,
                self._panels.data_ptr(),
                self._depth,
                bias,
                out.data_ptr(),
                DTYPES[dtype],
                self.num_outputs,
            )
        else:
            tiles, factors = self._quantize(x)
            launch(
                multiply_int8,
                num_panels,
                self._panels.nbytes * (0.04 + 0.005 * num_rows),
                4 * MOST_ROWS * COLUMNS,
                tiles.data_ptr(),
                factors.data_ptr(),
                num_rows,
                self._panels.data_ptr(),
                self._depth,
                self._scales.data_ptr(),
                bias,
                out.data_ptr(),
                DTYPES[dtype],
                self.num_outputs,
            )
        return out

    def gather(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight's rows `ids` (int64 [T]) in `dtype`, as products have them: [T, K]."""
        ids = ids.contiguous()
        out = empty((ids.shape[0], self.width), dtype)
        launch(
            gather_outputs,
            ids.shape[0],
            4.0 * out.numel(),
            4 * self._depth + 4 * (4 * self._depth + LANES),
            ids.data_ptr(),
            self._panels.data_ptr(),
            self._depth,
            0 if self._scales is None else self._scales.data_ptr(),
            self.width,
            out.data_ptr(),
            DTYPES[dtype],
        )
        return out

    def _arrange(self, x: torch.Tensor) -> torch.Tensor:
        """bfloat16 rows as tiles of words."""
        if self.width % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        num_rows = x.shape[0]
        if num_rows == 1:
            return x
        tiles = empty((num_rows, self._depth), torch.int32)
        launch(
            arrange_rows,
            -(-num_rows // rows_of(num_rows)),
            0.1 * tiles.numel(),
            0,
            x.data_ptr(),
            num_rows,
            4 * self._depth,
            self._depth,
            tiles.data_ptr(),
        )
        return tiles

    def _quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as tiles of int8 words, and the factors of their groups."""
        num_rows, groups = x.shape[0], -(-self.width // GROUP)
        tiles = empty((num_rows, self._depth), torch.int32)
        factors = empty((num_rows, groups, 2), torch.int32)
        launch(
            quantize_rows,
            -(-num_rows // rows_of(num_rows)),
            0.5 * x.numel(),
            (4 * GROUP + 1) * groups + GROUP,
            x.data_ptr(),
            DTYPES[x.dtype],
            num_rows,
            self.width,
            self._depth,
            GROUP,
            OFFSET,
            0,
            tiles.data_ptr(),
            factors.data_ptr(),
        )
        return tiles, factors


def rows_of(num_rows: int) -> int:
    """As `tile_rows` has it."""
    return -(-num_rows // -(-num_rows // MOST_ROWS))
