"""Products with weights in four bits, for processors that multiply int8 quadruples (`packed_weight.py` has the others).

    weights [N, K]  ->  panels of 32 outputs, each words [K / 8, 32]: a byte of word d holds input 8 d + i in its low
                        half and 8 d + 4 + i in its high half, so that either half, masked, is a word of four inputs
    scales, zeros   ->  beside the panels, [groups, 32] each

Rows are rounded to int8 per group of the weight. A unit of work is a panel with all rows. A row's bits do not depend on
the rows beside it.
"""

from __future__ import annotations

import numpy as np
import torch

from aiexport_edge.kernels.cpu.dot import COLUMNS, HAS_INT8, MOST_ROWS, Tile, int4_tile
from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.memory import load, set_float32, store, widen
from aiexport_edge.kernels.cpu.panels import pack_words
from aiexport_edge.kernels.cpu.products import write_tile
from aiexport_edge.kernels.cpu.row_tiles import quantize_rows, rows_of, tile_rows
from aiexport_edge.kernels.cpu.simd import LANES, add, fma, max_lanes, maximum, multiply, negate, splat, sum_lanes
from aiexport_edge.kernels.cpu.units import DTYPES, begin, end, next_unit
from aiexport_edge.kernels.cpu.words import int4_codes, store_octets
from aiexport_edge.kernels.large_pages import allocate
from aiexport_edge.kernels.quantization import INT4_GROUP, SHRINKS, Int4Weight
from aiexport_edge.kernels.threads import empty, launch

LARGEST_GROUP = 128  # inputs of a row that share a scale, whatever the weight's group
NUM_SHRINKS = len(SHRINKS)
GROUP_STEP = 16  # rows are rounded sixteen numbers at a time


@inner
def _no_tile(left: int, right: int, out: int, groups: int, words: int, factors: int, scales: int, zeros: int) -> None:
    """Stands for the product on processors that do not multiply int8 quadruples; never called there."""


def _int4(rows: int) -> Tile:
    return int4_tile(rows) if HAS_INT8 else _no_tile


_tile_1, _tile_2, _tile_3, _tile_4, _tile_5, _tile_6 = (_int4(rows) for rows in range(1, 7))
_tile_7, _tile_8, _tile_9, _tile_10, _tile_11, _tile_12 = (_int4(rows) for rows in range(7, 13))


@inner
def _tile(
    rows: int, left: int, right: int, out: int, groups: int, words: int, factors: int, scales: int, zeros: int
) -> None:
    if rows == 12:
        _tile_12(left, right, out, groups, words, factors, scales, zeros)
    elif rows == 1:
        _tile_1(left, right, out, groups, words, factors, scales, zeros)
    elif rows == 2:
        _tile_2(left, right, out, groups, words, factors, scales, zeros)
    elif rows == 3:
        _tile_3(left, right, out, groups, words, factors, scales, zeros)
    elif rows == 4:
        _tile_4(left, right, out, groups, words, factors, scales, zeros)
    elif rows == 5:
        _tile_5(left, right, out, groups, words, factors, scales, zeros)
    elif rows == 6:
        _tile_6(left, right, out, groups, words, factors, scales, zeros)
    elif rows == 7:
        _tile_7(left, right, out, groups, words, factors, scales, zeros)
    elif rows == 8:
        _tile_8(left, right, out, groups, words, factors, scales, zeros)
    elif rows == 9:
        _tile_9(left, right, out, groups, words, factors, scales, zeros)
    elif rows == 10:
        _tile_10(left, right, out, groups, words, factors, scales, zeros)
    else:
        _tile_11(left, right, out, groups, words, factors, scales, zeros)


@kernel
def multiply_int4(
    control: int,
    scratch: int,
    num_units: int,
    tiles: int,
    factors: int,
    num_rows: int,
    panels: int,
    groups: int,
    words: int,
    scales: int,
    zeros: int,
    bias: int,
    out: int,
    out_dtype: int,
    num_outputs: int,
) -> None:
    """Tiles of rounded rows times panels of `groups` of `words` words, to [num_rows, num_outputs]."""
    most = tile_rows(num_rows)
    item = 4 if out_dtype == 0 else 2
    unit = begin(control)
    while unit < num_units:
        first = unit * COLUMNS
        panel = panels + first * groups * words * 4
        own_scales, own_zeros = scales + 4 * first * groups, zeros + first * groups
        for row in range(0, num_rows, most):
            rows = min(most, num_rows - row)
            left = tiles + row * groups * words * 8
            facts = factors + row * groups * 8
            _tile(rows, left, panel, scratch, groups, words, facts, own_scales, own_zeros)
            place = out + (row * num_outputs + first) * item
            own_bias = bias + 4 * first if bias != 0 else 0
            columns = min(COLUMNS, num_outputs - first)
            write_tile(scratch, rows, 0, own_bias, place, out_dtype, num_outputs * item, columns)
        unit = next_unit(control)
    end(control)


@inner
def _error(place: int, count: int, scale: float, zero: float) -> float:
    """Squared error of `count` numbers as codes."""
    total = splat(np.float32(0.0))
    by, offset = splat(np.float32(scale)), splat(np.float32(-zero))
    for i in range(0, count, LANES):
        value = load(place + 4 * i)
        code = int4_codes(value, np.float32(scale), np.float32(zero))
        off = add(multiply(add(code, offset), by), negate(value))
        total = fma(off, off, total)
    return float(sum_lanes(total))


@kernel
def round_groups(
    control: int,
    scratch: int,
    num_units: int,
    weight: int,
    dtype: int,
    width: int,
    group: int,
    codes: int,
    scales: int,
    zeros: int,
) -> None:
    """`quantization.quantize_int4` of a row a unit; `codes` bytes and `zeros` float32, of whole groups."""
    groups = (width + group - 1) // group
    item = 4 if dtype == 0 else 2
    unit = begin(control)
    while unit < num_units:
        for i in range(width // LANES * LANES, groups * group, LANES):
            store(scratch + 4 * i, splat(np.float32(0.0)))
        widen(dtype, weight + unit * width * item, scratch, width)
        for number in range(groups):
            place = scratch + 4 * number * group
            above, below = splat(np.float32(0.0)), splat(np.float32(0.0))
            for i in range(0, group, LANES):
                above = maximum(load(place + 4 * i), above)
                below = maximum(negate(load(place + 4 * i)), below)
            low, size = -max_lanes(below), max_lanes(above) + max_lanes(below)
            best_scale, best_zero, least = np.float32(0.0), np.float32(0.0), -1.0
            for step in range(NUM_SHRINKS):
                shrink = np.float32(1.0 - 0.05 * step)
                scale = max(size * (shrink / np.float32(15.0)), np.float32(1e-30))
                zero = np.float32(np.rint(low * -shrink / scale))
                error = _error(place, group, float(scale), float(zero))
                if least < 0.0 or error < least:
                    best_scale, best_zero, least = scale, zero, error
            for i in range(0, group, LANES):
                rounded = int4_codes(load(place + 4 * i), best_scale, best_zero)
                store_octets(codes + (unit * groups + number) * group + i, rounded)
            set_float32(scales, unit * groups + number, best_scale)
            set_float32(zeros, unit * groups + number, best_zero)
        unit = next_unit(control)
    end(control)


def round_weight(weight: torch.Tensor, group: int = INT4_GROUP) -> Int4Weight:
    """`quantization.quantize_int4` of a weight [N, K] on a CPU, in any float dtype; groups of a multiple of 16."""
    assert group % GROUP_STEP == 0
    weight = weight.contiguous()
    num_outputs, width = weight.shape
    groups = -(-width // group)
    codes = torch.empty((num_outputs, groups * group), dtype=torch.uint8)
    scales, zeros = torch.empty((num_outputs, groups)), torch.empty((num_outputs, groups))
    launch(
        round_groups,
        num_outputs,
        3.0 * weight.numel(),
        4 * (groups * group + LANES),
        weight.data_ptr(),
        DTYPES[weight.dtype],
        width,
        group,
        codes.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
    )
    return Int4Weight(codes[:, :width], scales, zeros.to(torch.uint8), group)


def fits(weight: Int4Weight) -> bool:
    """Whether this processor has the products, and the weight's groups are of a size that `PackedInt4` takes."""
    group = weight.group
    return HAS_INT8 and group % GROUP_STEP == 0 and (group <= LARGEST_GROUP or group % LARGEST_GROUP == 0)


class PackedInt4:
    """A weight [N, K] in four bits, in panels. The caller may drop the weight it came from."""

    def __init__(self, weight: Int4Weight, bias: torch.Tensor | None) -> None:
        """weight: one that `fits`, on a CPU; bias [N]."""
        assert fits(weight)
        self.num_outputs, self.width = weight.shape
        self._group = min(weight.group, LARGEST_GROUP)
        self._groups = -(-self.width // self._group)
        self._words = self._group // 8
        self._order = None if weight.order is None else weight.order.contiguous()
        padded_outputs = -(-self.num_outputs // COLUMNS) * COLUMNS
        depth = self._groups * self._words
        self._panels = allocate(padded_outputs * depth * 4)
        codes = torch.nn.functional.pad(weight.codes, (0, self._groups * self._group - self.width))
        pairs = codes.view(self.num_outputs, depth, 2, 4)
        halves = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
        launch(
            pack_words,
            padded_outputs // COLUMNS,
            0.2 * halves.numel(),
            0,
            halves.data_ptr(),
            4 * depth,
            self.num_outputs,
            depth,
            self._panels.data_ptr(),
        )
        self._scales, self._zeros = (self._by_panel(each, weight.group) for each in (weight.scales, weight.zeros))
        self._bias = None
        if bias is not None:
            self._bias = torch.zeros(padded_outputs)
            self._bias[: self.num_outputs] = bias

    def _by_panel(self, values: torch.Tensor, group: int) -> torch.Tensor:
        """[N, groups of the weight] -> [panels, groups, 32], of outputs past the last zero."""
        values = values.repeat_interleave(group // self._group, dim=1)[:, : self._groups]
        values = torch.nn.functional.pad(values, (0, 0, 0, -self.num_outputs % COLUMNS))
        return values.view(-1, COLUMNS, self._groups).transpose(1, 2).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(part.nbytes for part in (self._panels, self._scales, self._zeros, self._bias) if part is not None)

    def multiply(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x [M, K] in any float dtype -> x Wᵀ + b [M, N] in `dtype`."""
        num_rows = x.shape[0]
        out = empty((num_rows, self.num_outputs), dtype)
        if num_rows == 0:
            return out
        tiles, factors = self._round(x.contiguous())
        launch(
            multiply_int4,
            -(-self.num_outputs // COLUMNS),
            self._panels.nbytes * (0.06 + 0.01 * num_rows),
            4 * MOST_ROWS * COLUMNS,
            tiles.data_ptr(),
            factors.data_ptr(),
            num_rows,
            self._panels.data_ptr(),
            self._groups,
            self._words,
            self._scales.data_ptr(),
            self._zeros.data_ptr(),
            0 if self._bias is None else self._bias.data_ptr(),
            out.data_ptr(),
            DTYPES[dtype],
            self.num_outputs,
        )
        return out

    def _round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as tiles of int8 words, and the factors of their groups."""
        num_rows, depth = x.shape[0], 2 * self._groups * self._words
        tiles = empty((num_rows, depth), torch.int32)
        factors = empty((num_rows, self._groups, 2), torch.int32)
        launch(
            quantize_rows,
            -(-num_rows // rows_of(num_rows)),
            0.5 * x.numel(),
            4 * self._groups * self._group + LARGEST_GROUP + 4 * (self.width + LANES),
            x.data_ptr(),
            DTYPES[x.dtype],
            num_rows,
            self.width,
            depth,
            self._group,
            1,
            0 if self._order is None else self._order.data_ptr(),
            tiles.data_ptr(),
            factors.data_ptr(),
        )
        return tiles, factors
