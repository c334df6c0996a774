"""Products with weights in four bits, for processors that multiply int8 quadruples (`products.py` has the others).

    weights [N, K]  ->  panels of 32 outputs, each words [K / 8, 32]: a byte of word d holds input 8 d + i in its low
                        half and 8 d + 4 + i in its high half, so that either half, masked, is a word of four inputs
    scales, zeros   ->  beside the panels, [groups, 32] each

Rows are rounded to int8 per group of the weight. A unit of work is a panel with all rows. A row's bits do not depend on
the rows beside it.
"""

from __future__ import annotations

import torch

from aiexport_edge.kernels.cpu.dot import COLUMNS, HAS_INT8, MOST_ROWS, Tile, int4_tile
from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.products import (
    allocate,
    pack_words,
    quantize_rows,
    rows_of,
    tile_rows,
    write_tile,
)
from aiexport_edge.kernels.cpu.simd import LANES
from aiexport_edge.kernels.cpu.units import DTYPES, begin, end, next_unit
from aiexport_edge.kernels.quantization import Int4Weight
from aiexport_edge.kernels.threads import empty, launch

LARGEST_GROUP = 128  # inputs of a row that share a scale, whatever the weight's group
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
