"""Products of a few rows with 32 packed columns, in the instructions that multiply bfloat16 pairs and int8 quadruples.

A 32-bit word holds 2 bfloat16 or 4 int8 that follow each other along the inner dimension. Packed columns are words
[depth, 32], packed rows are words [depth, rows]: both are read from front to back. Every sum is one chain over the
depth in a fixed order, so its bits depend on neither the number of rows nor a row's place. Knows no operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from aiexport_edge.kernels.cpu import building, memory, simd
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
    """Prefetch a row of packed columns."""
    read_only, level_1, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    for offset in range(0, 4 * COLUMNS, 64):
        place = memory.pointer(builder, _at(builder, address, offset), simd.F32)
        simd.call(builder, "llvm.prefetch.p0", ir.VoidType(), place, read_only, level_1, data)


def _chains(
    builder: Any,
    num_rows: int,
    left: Any,
    right: Any,
    depth: Any,
    ahead: Any,
    step: Any,
    starts: dict[Any, Any],
    dot: Any,
) -> Any:
    """From `starts` (by row and first column) over all of the depth: left words [depth, rows], right [depth, 32].

    Memory from `ahead` on is asked for meanwhile, `step` bytes further at each turn.
    """
    sums = {cell: building.alloca_once_value(builder, start) for cell, start in starts.items()}
    with building.for_range(builder, depth) as loop:
        columns = builder.add(right, builder.mul(ir.Constant(I64, 4 * COLUMNS), loop.index))
        rows = builder.add(left, builder.mul(ir.Constant(I64, 4 * num_rows), loop.index))
        _ask_ahead(builder, builder.add(ahead, builder.mul(step, loop.index)))
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
    """out[rows, 32] = left @ right in float32: left words [depth, rows], right words [depth, 32].

    `ahead` and `step`: see `_chains`.
    """

    @simd.operation(simd.none, *[simd.int64] * 6)
    def tile(builder: Any, left: Any, right: Any, out: Any, depth: Any, ahead: Any, step: Any) -> None:
        starts = {cell: simd.constant(FLOATS, 0.0) for cell in _cells(num_rows)}
        sums = _chains(builder, num_rows, left, right, depth, ahead, step, starts, dot_bfloat16)
        for (row, column), value in sums.items():
            place = _at(builder, out, 4 * (row * COLUMNS + column))
            builder.store(value, memory.pointer(builder, place, FLOATS), align=4)

    function: Tile = tile
    return function


def int8_tile(num_rows: int) -> Tile:
    """out[rows, 32] += scale * (left @ right), one group of the depth: left signed [depth, rows], right unsigned.

    `factors` holds int32 [rows], what the unsigned columns' offset of 128 adds to each sum with its sign turned, and
    then float32 [rows], the scales. `ahead` and `step`: see `_chains`.
    """

    @simd.operation(simd.none, *[simd.int64] * 7)
    def tile(builder: Any, left: Any, right: Any, out: Any, depth: Any, factors: Any, ahead: Any, step: Any) -> None:
        def item(form: Any, index: int) -> Any:
            place = memory.pointer(builder, _at(builder, factors, 4 * index), form)
            return builder.load(place, align=4, typ=form)

        offsets = [simd.broadcast(builder, item(I32, row), WORDS) for row in range(num_rows)]
        starts = {(row, column): offsets[row] for row, column in _cells(num_rows)}

        def dot(builder: Any, sums: Any, factor: Any, values: Any) -> Any:
            return dot_int8(builder, sums, values, factor)

        sums = _chains(builder, num_rows, left, right, depth, ahead, step, starts, dot)
        for (row, column), value in sums.items():
            place = memory.pointer(builder, _at(builder, out, 4 * (row * COLUMNS + column)), FLOATS)
            scale = simd.broadcast(builder, item(simd.F32, num_rows + row), FLOATS)
            before = builder.load(place, align=4, typ=FLOATS)
            builder.store(simd.fused(builder, builder.sitofp(value, FLOATS), scale, before), place, align=4)

    function: Tile = tile
    return function


def int4_tile(num_rows: int) -> Tile:
    """out[rows, 32] = left @ (right - zeros) * scales, in float32, over all groups of the depth, the first one first.

    left: signed bytes, words [2 * depth, rows]. right: 4-bit codes, words [depth, 32]; the low halves of a word's bytes
    belong to left's word 2 * d, the high halves to the next. A group is `words` words of right. Of each group
    `factors` holds int32 [rows], the sum of the row's bytes with its sign turned, then float32 [rows], the row's
    scale; `scales` float32 [32] and `zeros` uint8 [32] are the columns'.
    """

    @simd.operation(simd.none, *[simd.int64] * 8)
    def tile(
        builder: Any, left: Any, right: Any, out: Any, groups: Any, words: Any, factors: Any, scales: Any, zeros: Any
    ) -> None:
        cells = _cells(num_rows)
        octets = ir.VectorType(ir.IntType(8), LANES)
        halves, four = simd.constant(WORDS, 0x0F0F0F0F), simd.constant(WORDS, 4)

        def output(row: int, column: int) -> Any:
            return memory.pointer(builder, _at(builder, out, 4 * (row * COLUMNS + column)), FLOATS)

        def past(address: Any, size: Any, index: Any) -> Any:
            return builder.add(address, builder.mul(size, index))

        for cell in cells:
            builder.store(simd.constant(FLOATS, 0.0), output(*cell), align=4)
        sums = {cell: building.alloca_once(builder, WORDS) for cell in cells}
        right_bytes = builder.mul(words, ir.Constant(I64, 4 * COLUMNS))
        left_bytes = builder.mul(words, ir.Constant(I64, 8 * num_rows))
        with building.for_range(builder, groups) as outer:
            facts = past(factors, ir.Constant(I64, 8 * num_rows), outer.index)
            group_right = past(right, right_bytes, outer.index)
            group_left = past(left, left_bytes, outer.index)
            group_zeros = past(zeros, ir.Constant(I64, COLUMNS), outer.index)
            group_scales = past(scales, ir.Constant(I64, 4 * COLUMNS), outer.index)

            def item(form: Any, index: int, facts: Any = facts) -> Any:
                place = memory.pointer(builder, _at(builder, facts, 4 * index), form)
                return builder.load(place, align=4, typ=form)

            offsets = [simd.broadcast(builder, item(I32, row), WORDS) for row in range(num_rows)]
            for column in range(0, COLUMNS, LANES):
                place = memory.pointer(builder, _at(builder, group_zeros, column), octets)
                own = builder.zext(builder.load(place, align=1, typ=octets), WORDS)
                for row in range(num_rows):
                    builder.store(builder.mul(own, offsets[row]), sums[row, column])
            with building.for_range(builder, words) as inner:
                columns = past(group_right, ir.Constant(I64, 4 * COLUMNS), inner.index)
                rows = past(group_left, ir.Constant(I64, 8 * num_rows), inner.index)
                _ask_ahead(builder, _at(builder, columns, PREFETCH_BYTES))
                codes = {
                    column: memory.read(builder, _at(builder, columns, 4 * column), WORDS)
                    for column in range(0, COLUMNS, LANES)
                }
                for part in range(2):
                    rights = {
                        column: builder.and_(builder.lshr(value, four) if part else value, halves)
                        for column, value in codes.items()
                    }
                    for row in range(num_rows):
                        place = memory.pointer(builder, _at(builder, rows, 4 * (part * num_rows + row)), I32)
                        factor = simd.broadcast(builder, builder.load(place, align=4, typ=I32), WORDS)
                        for column, values in rights.items():
                            cell = sums[row, column]
                            builder.store(dot_int8(builder, builder.load(cell), values, factor), cell)
            for row in range(num_rows):
                scale = simd.broadcast(builder, item(simd.F32, num_rows + row), FLOATS)
                for column in range(0, COLUMNS, LANES):
                    own = memory.read(builder, _at(builder, group_scales, 4 * column))
                    value = builder.sitofp(builder.load(sums[row, column]), FLOATS)
                    before = builder.load(output(row, column), align=4, typ=FLOATS)
                    total = simd.fused(builder, value, builder.fmul(own, scale), before)
                    builder.store(total, output(row, column), align=4)

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
            sums[cell] = building.alloca_once_value(builder, simd.constant(FLOATS, 0.0))
        with builder.if_then(adds):
            for cell, place in sums.items():
                builder.store(builder.load(output(*cell), align=4, typ=FLOATS), place)
        with building.for_range(builder, depth) as loop:
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


@simd.operation(simd.none, *[simd.int64] * 5)
def dot_rows(builder: Any, addresses: Any, offset: Any, left: Any, vectors: Any, out: Any) -> None:
    """out[i] = left · row i in float32, for sixteen bfloat16 rows that begin `offset` bytes past their addresses.

    All are `vectors` times 32 numbers long. Each lane is a chain of its own and the lanes are added last: other bits
    than a tile's, and no transposing, which a single row of left does not pay for.
    """
    rows = []
    for row in range(LANES):
        place = memory.pointer(builder, addresses, I64, ir.Constant(I32, row))
        rows.append(builder.add(builder.load(place, align=8, typ=I64), offset))
    sums = [building.alloca_once_value(builder, simd.constant(FLOATS, 0.0)) for _ in rows]
    with building.for_range(builder, vectors) as loop:
        step = builder.mul(loop.index, ir.Constant(I64, 4 * LANES))
        factor = memory.read(builder, builder.add(left, step), WORDS)
        for row, place in zip(rows, sums, strict=True):
            values = builder.load(memory.pointer(builder, builder.add(row, step), WORDS), align=2, typ=WORDS)
            builder.store(dot_bfloat16(builder, builder.load(place), factor, values), place)
    parts = [builder.load(place) for place in sums]
    width = LANES // 2
    while width:  # as transposing does it, adding the two halves at each turn
        low = [lane if lane & width == 0 else lane + LANES - width for lane in range(LANES)]
        high = [lane + width if lane & width == 0 else lane + LANES for lane in range(LANES)]
        parts = [
            builder.fadd(
                builder.shuffle_vector(upper, lower, ir.Constant(WORDS, low)),
                builder.shuffle_vector(upper, lower, ir.Constant(WORDS, high)),
            )
            for upper, lower in zip(parts[:width], parts[width:], strict=True)
        ]
        width //= 2
    builder.store(parts[0], memory.pointer(builder, out, FLOATS), align=4)


def add_pairs(num_rows: int) -> Tile:
    """out[rows, 32] += weights @ values, 32 of the numbers of rows at addresses; what a `pair_tile` of them gives.

    weights: bfloat16 pairs, `weights_stride` bytes between rows. The values' rows begin `offset` bytes past the first
    2 * depth of `addresses`.
    """
    halves, order = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(I32, 2 * LANES)

    @simd.operation(simd.none, *[simd.int64] * 7)
    def tile(
        builder: Any,
        weights: Any,
        weights_stride: Any,
        addresses: Any,
        offset: Any,
        out: Any,
        out_stride: Any,
        depth: Any,
    ) -> None:
        def output(row: int, column: int) -> Any:
            place = builder.add(out, builder.mul(out_stride, ir.Constant(I64, row)))
            return memory.pointer(builder, _at(builder, place, 4 * column), FLOATS)

        sums = {}
        for cell in _cells(num_rows):
            before = builder.load(output(*cell), align=4, typ=FLOATS)
            sums[cell] = building.alloca_once_value(builder, before)
        with building.for_range(builder, depth) as loop:
            pair = builder.add(addresses, builder.mul(loop.index, ir.Constant(I64, 16)))
            rows = []
            for second in range(2):
                place = memory.pointer(builder, pair, I64, ir.Constant(I32, second))
                address = builder.add(builder.load(place, align=8, typ=I64), offset)
                rows.append(builder.load(memory.pointer(builder, address, halves), align=2, typ=halves))
            rights = {}
            for half in range(2):
                lanes = [lane // 2 + LANES * half + (2 * LANES if lane % 2 else 0) for lane in range(2 * LANES)]
                rights[LANES * half] = builder.bitcast(
                    builder.shuffle_vector(rows[0], rows[1], ir.Constant(order, lanes)), WORDS
                )
            for row in range(num_rows):
                place = builder.add(weights, builder.mul(weights_stride, ir.Constant(I64, row)))
                place = builder.add(place, builder.mul(loop.index, ir.Constant(I64, 4)))
                factor = simd.broadcast(
                    builder, builder.load(memory.pointer(builder, place, I32), align=4, typ=I32), WORDS
                )
                for column, values in rights.items():
                    cell = sums[row, column]
                    builder.store(dot_bfloat16(builder, builder.load(cell), factor, values), cell)
        for cell, place in sums.items():
            builder.store(builder.load(place), output(*cell), align=4)

    function: Tile = tile
    return function
