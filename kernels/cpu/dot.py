"""Products of a few rows with 32 packed columns, in the instructions that multiply bfloat16 pairs and int8 quadruples.

A 32-bit word holds 2 bfloat16 or 4 int8 that follow each other along the inner dimension. Packed columns are words
[depth, 32], packed rows are words [depth, rows]: both are read from front to back. Every sum is one chain over the
depth in a fixed order, so its bits depend on neither the number of rows nor a row's place. Knows no operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

from aiexport_edge.kernels.cpu import memory, simd
from aiexport_edge.kernels.cpu.simd import FEATURES, FLOATS, I32, I64, LANES, WORDS

HAS_BFLOAT16 = {"avx512f", "avx512bf16"} <= FEATURES
HAS_INT8 = {"avx512f", "avx512vnni"} <= FEATURES

COLUMNS = 32
MOST_ROWS = 12  # 24 of 32 registers hold sums
PREFETCH_BYTES = 1024  # ahead in the packed columns

Tile = Callable[..., None]


class _BFloat16(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    null, intrinsic_name = "0.0", "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


def dot_bfloat16(builder: Any, sums: Any, left: Any, right: Any) -> Any:
    """sums + left · right of each word's two bfloat16, in float32. left and right are vectors of words."""
    left, right = builder.bitcast(left, _PAIRS), builder.bitcast(right, _PAIRS)
    return simd.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, sums, left, right)


def dot_int8(builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """sums + unsigned · signed of each word's four bytes, in int32."""
    return simd.call(builder, "llvm.x86.avx512.vpdpbusd.512", WORDS, sums, unsigned, signed)


def _at(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(I64, offset))


def _ask_ahead(builder: Any, address: Any) -> None:
    read_only, level_1, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    for offset in range(0, 4 * COLUMNS, 64):
        place = memory.pointer(builder, _at(builder, address, PREFETCH_BYTES + offset), simd.F32)
        simd.call(builder, "llvm.prefetch.p0", ir.VoidType(), place, read_only, level_1, data)


def _chains(builder: Any, num_rows: int, left: Any, right: Any, depth: Any, starts: dict[Any, Any], dot: Any) -> Any:
    """From `starts` (by row and first column) over all of the depth: left words [depth, rows], right [depth, 32]."""
    sums = {cell: cgutils.alloca_once_value(builder, start) for cell, start in starts.items()}  # type: ignore[no-untyped-call]
    with cgutils.for_range(builder, depth) as loop:
        columns = builder.add(right, builder.mul(ir.Constant(I64, 4 * COLUMNS), loop.index))
        rows = builder.add(left, builder.mul(ir.Constant(I64, 4 * num_rows), loop.index))
        _ask_ahead(builder, columns)
        rights = {
            column: memory.read(builder, _at(builder, columns, 4 * column), WORDS)
            for column in range(0, COLUMNS, LANES)
        }
        for row in range(num_rows):
            word = builder.load(memory.pointer(builder, _at(builder, rows, 4 * row), I32), align=4, typ=I32)
            factor = simd.broadcast(builder, word, WORDS)
            for column, values in rights.items():
                place = sums[row, column]
                builder.store(dot(builder, builder.load(place), factor, values), place)
    return {cell: builder.load(place) for cell, place in sums.items()}


def _cells(num_rows: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(num_rows) for column in range(0, COLUMNS, LANES)]


def bfloat16_tile(num_rows: int) -> Tile:
    """out[rows, 32] = left @ right in float32: left words [depth, rows], right words [depth, 32]."""

    @simd.operation(simd.none, *[simd.int64] * 4)
    def tile(builder: Any, left: Any, right: Any, out: Any, depth: Any) -> None:
        starts = {cell: simd.constant(FLOATS, 0.0) for cell in _cells(num_rows)}
        sums = _chains(builder, num_rows, left, right, depth, starts, dot_bfloat16)
        for (row, column), value in sums.items():
            place = _at(builder, out, 4 * (row * COLUMNS + column))
            builder.store(value, memory.pointer(builder, place, FLOATS), align=4)

    function: Tile = tile
    return function


def int8_tile(num_rows: int) -> Tile:
    """out[rows, 32] += scale * (left @ right), one group of the depth: left signed [depth, rows], right unsigned.

    `factors` holds int32 [rows], what the unsigned columns' offset of 128 adds to each sum with its sign turned, and
    then float32 [rows], the scales.
    """

    @simd.operation(simd.none, *[simd.int64] * 5)
    def tile(builder: Any, left: Any, right: Any, out: Any, depth: Any, factors: Any) -> None:
        def item(form: Any, index: int) -> Any:
            place = memory.pointer(builder, _at(builder, factors, 4 * index), form)
            return builder.load(place, align=4, typ=form)

        offsets = [simd.broadcast(builder, item(I32, row), WORDS) for row in range(num_rows)]
        starts = {(row, column): offsets[row] for row, column in _cells(num_rows)}

        def dot(builder: Any, sums: Any, factor: Any, values: Any) -> Any:
            return dot_int8(builder, sums, values, factor)

        sums = _chains(builder, num_rows, left, right, depth, starts, dot)
        for (row, column), value in sums.items():
            place = memory.pointer(builder, _at(builder, out, 4 * (row * COLUMNS + column)), FLOATS)
            scale = simd.broadcast(builder, item(simd.F32, num_rows + row), FLOATS)
            before = builder.load(place, align=4, typ=FLOATS)
            builder.store(simd.fused(builder, builder.sitofp(value, FLOATS), scale, before), place, align=4)

    function: Tile = tile
    return function


def pair_tile(num_rows: int) -> Tile:
    """out[rows, 32] (+)= left @ right in float32, over bfloat16 pairs; `start` 0: from zero. Strides are in bytes.

    The word of left's row r at depth d lies at r * row_stride + d * depth_stride.
    """

    @simd.operation(simd.none, *[simd.int64] * 9)
    def tile(
        builder: Any,
        left: Any,
        row_stride: Any,
        depth_stride: Any,
        right: Any,
        right_stride: Any,
        out: Any,
        out_stride: Any,
        depth: Any,
        start: Any,
    ) -> None:
        def output(row: int, column: int) -> Any:
            place = builder.add(out, builder.mul(out_stride, ir.Constant(I64, row)))
            return memory.pointer(builder, _at(builder, place, 4 * column), FLOATS)

        adds = builder.icmp_signed("!=", start, ir.Constant(I64, 0))
        sums = {}
        for cell in _cells(num_rows):
            sums[cell] = cgutils.alloca_once_value(builder, simd.constant(FLOATS, 0.0))  # type: ignore[no-untyped-call]
        with builder.if_then(adds):
            for cell, place in sums.items():
                builder.store(builder.load(output(*cell), align=4, typ=FLOATS), place)
        with cgutils.for_range(builder, depth) as loop:
            columns = builder.add(right, builder.mul(right_stride, loop.index))
            rows = builder.add(left, builder.mul(depth_stride, loop.index))
            rights = {
                column: memory.read(builder, _at(builder, columns, 4 * column), WORDS)
                for column in range(0, COLUMNS, LANES)
            }
            for row in range(num_rows):
                place = builder.add(rows, builder.mul(row_stride, ir.Constant(I64, row)))
                word = builder.load(memory.pointer(builder, place, I32), align=4, typ=I32)
                factor = simd.broadcast(builder, word, WORDS)
                for column, values in rights.items():
                    cell = sums[row, column]
                    builder.store(dot_bfloat16(builder, builder.load(cell), factor, values), cell)
        for cell, place in sums.items():
            builder.store(builder.load(place), output(*cell), align=4)

    function: Tile = tile
    return function
