"""32-bit words of two bfloat16 or four int8: made of rows, by transposing or pairing them or by rounding float32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from aiexport_edge.kernels.cpu.memory import pointer, transpose
from aiexport_edge.kernels.cpu.simd import (
    FLOATS,
    HALVES,
    I32,
    I64,
    LANES,
    WORDS,
    broadcast,
    call,
    constant,
    float32,
    int64,
    lanes_below,
    none,
    operation,
    vector,
)

_BYTES = ir.VectorType(ir.IntType(8), LANES)
_HALVES, _INDEXES = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(I32, 2 * LANES)


@operation(none, int64, int64, int64)
def set_int32(builder: Any, address: Any, index: Any, value: Any) -> None:
    """Write item `index` of an int32 array."""
    builder.store(builder.trunc(value, I32), pointer(builder, address, I32, index), align=4)


def _transpose_words(
    builder: Any,
    source: Any,
    source_stride: Any,
    num_rows: Any,
    num_words: Any,
    target: Any,
    target_stride: Any,
    num_lanes: Any,
) -> None:
    nothing = ir.Constant(I64, 0)
    rows = []
    for row in range(LANES):
        exists = builder.icmp_signed(">", num_rows, ir.Constant(I64, row))
        count = lanes_below(builder, builder.select(exists, num_words, nothing))
        address = builder.add(source, builder.mul(source_stride, ir.Constant(I64, row)))
        place = pointer(builder, address, WORDS)
        rows.append(
            call(builder, "llvm.masked.load.v16i32.p0", WORDS, place, ir.Constant(I32, 2), count, constant(WORDS, 0))
        )
    for word, value in enumerate(transpose(builder, rows)):
        exists = builder.icmp_signed(">", num_words, ir.Constant(I64, word))
        count = lanes_below(builder, builder.select(exists, num_lanes, nothing))
        place = pointer(builder, builder.add(target, builder.mul(target_stride, ir.Constant(I64, word))), WORDS)
        call(builder, "llvm.masked.store.v16i32.p0", ir.VoidType(), value, place, ir.Constant(I32, 4), count)


@operation(none, int64, int64, int64, int64, int64, int64)
def transpose_words(
    builder: Any, source: Any, source_stride: Any, num_rows: Any, num_words: Any, target: Any, target_stride: Any
) -> None:
    """target[w, r] = source[r, w] for 16 words of 16 rows; rows from `num_rows` on are zero and not read.

    Words from `num_words` on are neither read nor written. Strides are in bytes, words at any multiple of two.
    """
    whole = ir.Constant(I64, LANES)
    _transpose_words(builder, source, source_stride, num_rows, num_words, target, target_stride, whole)


@operation(none, int64, int64, int64, int64, int64)
def arrange_words(builder: Any, source: Any, source_stride: Any, num_rows: Any, num_words: Any, target: Any) -> None:
    """As `transpose_words`, into words [16, num_rows]: rows that are not there are not written either."""
    stride = builder.mul(num_rows, ir.Constant(I64, 4))
    _transpose_words(builder, source, source_stride, num_rows, num_words, target, stride, num_rows)


@operation(int64, int64, float32, int64)
def quantize_lanes(builder: Any, source: Any, factor: Any, target: Any) -> Any:
    """Sixteen float32 times `factor`, rounded to nearest, ties to even, to int8; their sum. |x| * factor <= 127."""
    value = builder.load(pointer(builder, source, FLOATS), align=4, typ=FLOATS)
    scaled = builder.fmul(value, broadcast(builder, factor, FLOATS))
    words = builder.fptosi(call(builder, "llvm.rint.v16f32", FLOATS, scaled), WORDS)
    builder.store(builder.trunc(words, _BYTES), pointer(builder, target, _BYTES), align=1)
    return builder.sext(call(builder, "llvm.vector.reduce.add.v16i32", I32, words), I64)


@operation(none, int64, float32, int64, int64)
def quantize_unsigned(builder: Any, source: Any, scale: Any, target: Any, count: Any) -> None:
    """The first `count` of sixteen float32 over `scale`, rounded to nearest, ties to even, plus 128, to uint8."""
    value = builder.load(pointer(builder, source, FLOATS), align=4, typ=FLOATS)
    scaled = builder.fdiv(value, broadcast(builder, scale, FLOATS))
    words = builder.fptosi(call(builder, "llvm.rint.v16f32", FLOATS, scaled), WORDS)
    octets = builder.trunc(builder.add(words, constant(WORDS, 128)), _BYTES)
    arguments = octets, pointer(builder, target, _BYTES), ir.Constant(I32, 1), lanes_below(builder, count)
    call(builder, "llvm.masked.store.v16i8.p0", ir.VoidType(), *arguments)


@operation(vector, vector, float32, float32)
def int4_codes(builder: Any, value: Any, scale: Any, zero: Any) -> Any:
    """value / scale to the nearest integer, ties to even, plus zero, held to 0 … 15."""
    scaled = builder.fdiv(value, broadcast(builder, scale, FLOATS))
    rounded = call(builder, "llvm.rint.v16f32", FLOATS, scaled)
    code = builder.fadd(rounded, broadcast(builder, zero, FLOATS))
    code = builder.select(builder.fcmp_ordered(">", code, constant(FLOATS, 15.0)), constant(FLOATS, 15.0), code)
    return builder.select(builder.fcmp_ordered("<", code, constant(FLOATS, 0.0)), constant(FLOATS, 0.0), code)


@operation(none, int64, vector)
def store_octets(builder: Any, address: Any, value: Any) -> None:
    """Sixteen whole numbers from 0 to 127 to memory as bytes."""
    octets = builder.trunc(builder.fptosi(value, WORDS), _BYTES)
    builder.store(octets, pointer(builder, address, _BYTES), align=1)


@operation(none, int64, int64, int64, int64)
def gather_columns(builder: Any, addresses: Any, offset: Any, target: Any, target_stride: Any) -> None:
    """target[w, r] = word w of the 16 words that begin `offset` bytes into the r-th of sixteen rows."""
    rows = []
    for row in range(LANES):
        place = pointer(builder, addresses, I64, ir.Constant(I32, row))
        address = builder.add(builder.load(place, align=8, typ=I64), offset)
        rows.append(builder.load(pointer(builder, address, WORDS), align=2, typ=WORDS))
    for word, value in enumerate(transpose(builder, rows)):
        place = pointer(builder, builder.add(target, builder.mul(target_stride, ir.Constant(I64, word))), WORDS)
        builder.store(value, place, align=4)


@operation(none, int64, int64, int64)
def pair_rows(builder: Any, first: Any, second: Any, target: Any) -> None:
    """32 words, each with number i of the first row low and of the second row high."""
    low, high = (builder.load(pointer(builder, row, _HALVES), align=2, typ=_HALVES) for row in (first, second))
    for half in range(2):
        order = [lane // 2 + LANES * half + (2 * LANES if lane % 2 else 0) for lane in range(2 * LANES)]
        words = builder.shuffle_vector(low, high, ir.Constant(_INDEXES, order))
        builder.store(words, pointer(builder, _past(builder, target, 4 * LANES * half), _HALVES), align=4)


def _past(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(I64, offset))


@operation(vector, int64, vector)
def store_rounded(builder: Any, address: Any, value: Any) -> Any:
    """Sixteen numbers, none negative or NaN, to memory as bfloat16 (nearest, ties to even); the rounded numbers."""
    bits = builder.bitcast(value, WORDS)
    odd = builder.and_(builder.lshr(bits, constant(WORDS, 16)), constant(WORDS, 1))
    bits = builder.add(builder.add(bits, constant(WORDS, 0x7FFF)), odd)
    halves = builder.trunc(builder.lshr(bits, constant(WORDS, 16)), HALVES)
    builder.store(halves, pointer(builder, address, HALVES), align=2)
    return builder.bitcast(builder.and_(bits, constant(WORDS, 0xFFFF0000)), FLOATS)
