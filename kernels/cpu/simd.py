"""Sixteen float32 at a time: the vector type that kernels are written in, and memory as addresses.

LLVM splits the vectors into whatever registers the processor has. Every operation rounds as written and sums run in a
fixed order, so a result has the same bits whichever loop or thread computes it. Knows no operation of a model.

Addresses are int64, in bytes. The dtype of memory is one of the codes `FLOAT32`, `BFLOAT16`, `FLOAT16`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic, models, register_model

from aiexport_edge.kernels.cpu.jit import inner

LANES = 16
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

_I16, _I32, _F16, _F32 = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()
_FLOATS = ir.VectorType(_F32, LANES)
_WORDS = ir.VectorType(_I32, LANES)
_HALVES = ir.VectorType(_I16, LANES)


class Float32x16(types.Type):
    """numba's type of a vector. It lives inside kernels only."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _FLOATS)  # type: ignore[no-untyped-call]


vector: Any = Float32x16()
int32, int64, float32, none = types.int32, types.int64, types.float32, types.none


def operation(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make `emit(builder, *values) -> value or None`, which writes LLVM code, a function that kernels can call."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def typer(_context: Any, *_arguments: Any) -> Any:
            def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
                value = emit(builder, *values)
                return context.get_dummy_value() if value is None else value

            return result(*parameters), generate

        typer.__name__, typer.__doc__ = emit.__name__, emit.__doc__
        # Named parameters, since numba would see *arguments as one tuple.
        typer.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
        return intrinsic(typer)

    return decorate


# --- Code that the operations share ---


def pointer(builder: Any, address: Any, item: Any, index: Any = None) -> Any:
    """Pointer to the array of `item` at `address`, or to item `index` of it."""
    base = builder.inttoptr(address, ir.PointerType(item))
    return base if index is None else builder.gep(base, [index], source_etype=item)


def constant(form: Any, value: float) -> Any:
    """A vector of one number."""
    return ir.Constant(form, [value] * LANES)


def broadcast(builder: Any, value: Any, form: Any) -> Any:
    """A vector of one scalar value."""
    single = builder.insert_element(ir.Constant(form, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, single, constant(_WORDS, 0))


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call an LLVM intrinsic by its full name."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [value.type for value in arguments]), name)
    return builder.call(function, arguments)


def _lanes_below(builder: Any, count: Any) -> Any:
    """Mask of the lanes whose number is less than `count` (int64)."""
    lanes = ir.Constant(_WORDS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, broadcast(builder, builder.trunc(count, _I32), _WORDS))


def read(builder: Any, address: Any, form: Any = _FLOATS) -> Any:
    """A vector in memory, at any multiple of its items' size."""
    return builder.load(pointer(builder, address, form), align=2 if form is _HALVES else 4, typ=form)


def _read_first(builder: Any, address: Any, count: Any, form: Any, suffix: str, width: int) -> Any:
    """The first `count` items of a vector, zero in the other lanes; nothing past them is touched."""
    place, alignment = pointer(builder, address, form), ir.Constant(_I32, width)
    mask, zero = _lanes_below(builder, count), constant(form, 0)
    return call(builder, f"llvm.masked.load.{suffix}.p0", form, place, alignment, mask, zero)


def _write_first(builder: Any, address: Any, value: Any, count: Any, suffix: str, width: int) -> None:
    place, alignment = pointer(builder, address, value.type), ir.Constant(_I32, width)
    name = f"llvm.masked.store.{suffix}.p0"
    call(builder, name, ir.VoidType(), value, place, alignment, _lanes_below(builder, count))


def _from_bfloat16(builder: Any, halves: Any) -> Any:
    words = builder.zext(halves, _WORDS)
    return builder.bitcast(builder.shl(words, constant(_WORDS, 16)), _FLOATS)


def _to_bfloat16(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even; a NaN stays one."""
    bits = builder.bitcast(value, _WORDS)
    odd = builder.and_(builder.lshr(bits, constant(_WORDS, 16)), constant(_WORDS, 1))
    rounded = builder.add(builder.add(bits, constant(_WORDS, 0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(is_nan, constant(_WORDS, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, constant(_WORDS, 16)), _HALVES)


def _from_float16(builder: Any, halves: Any) -> Any:
    return builder.fpext(builder.bitcast(halves, ir.VectorType(_F16, LANES)), _FLOATS)


def _to_float16(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.fptrunc(value, ir.VectorType(_F16, LANES)), _HALVES)


def fused(builder: Any, left: Any, right: Any, addend: Any) -> Any:
    """left * right + addend, rounded once."""
    return call(builder, "llvm.fma.v16f32", _FLOATS, left, right, addend)


def _fold(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine all lanes into one scalar: upper half with lower half, and so on."""
    width = LANES // 2
    while width:
        upper = ir.Constant(_WORDS, [(lane + width) % LANES for lane in range(LANES)])
        value = combine(value, builder.shuffle_vector(value, value, upper))
        width //= 2
    return builder.extract_element(value, ir.Constant(_I32, 0))


def _larger(builder: Any, left: Any, right: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


# --- Operations ---


@operation(vector, int64)
def load(builder: Any, address: Any) -> Any:
    """Sixteen float32 from memory."""
    return read(builder, address)


@operation(vector, int64, int64)
def load_first(builder: Any, address: Any, count: Any) -> Any:
    """`count` float32 from memory, zero in the other lanes."""
    return _read_first(builder, address, count, _FLOATS, "v16f32", 4)


@operation(none, int64, vector)
def store(builder: Any, address: Any, value: Any) -> None:
    """Sixteen float32 to memory."""
    builder.store(value, pointer(builder, address, _FLOATS), align=4)


@operation(none, int64, vector, int64)
def store_first(builder: Any, address: Any, value: Any, count: Any) -> None:
    """The first `count` lanes to memory as float32."""
    _write_first(builder, address, value, count, "v16f32", 4)


@operation(vector, int64)
def _load_bfloat16(builder: Any, address: Any) -> Any:
    return _from_bfloat16(builder, read(builder, address, _HALVES))


@operation(vector, int64, int64)
def _load_first_bfloat16(builder: Any, address: Any, count: Any) -> Any:
    return _from_bfloat16(builder, _read_first(builder, address, count, _HALVES, "v16i16", 2))


@operation(none, int64, vector)
def _store_bfloat16(builder: Any, address: Any, value: Any) -> None:
    builder.store(_to_bfloat16(builder, value), pointer(builder, address, _HALVES), align=2)


@operation(none, int64, vector, int64)
def _store_first_bfloat16(builder: Any, address: Any, value: Any, count: Any) -> None:
    _write_first(builder, address, _to_bfloat16(builder, value), count, "v16i16", 2)


@operation(vector, int64)
def _load_float16(builder: Any, address: Any) -> Any:
    return _from_float16(builder, read(builder, address, _HALVES))


@operation(vector, int64, int64)
def _load_first_float16(builder: Any, address: Any, count: Any) -> Any:
    return _from_float16(builder, _read_first(builder, address, count, _HALVES, "v16i16", 2))


@operation(none, int64, vector)
def _store_float16(builder: Any, address: Any, value: Any) -> None:
    builder.store(_to_float16(builder, value), pointer(builder, address, _HALVES), align=2)


@operation(none, int64, vector, int64)
def _store_first_float16(builder: Any, address: Any, value: Any, count: Any) -> None:
    _write_first(builder, address, _to_float16(builder, value), count, "v16i16", 2)


@operation(vector, float32)
def splat(builder: Any, value: Any) -> Any:
    """One number in all lanes."""
    return broadcast(builder, value, _FLOATS)


@operation(vector, vector, vector)
def add(builder: Any, left: Any, right: Any) -> Any:
    """left + right."""
    return builder.fadd(left, right)


@operation(vector, vector, vector)
def multiply(builder: Any, left: Any, right: Any) -> Any:
    """left * right."""
    return builder.fmul(left, right)


@operation(vector, vector, vector)
def divide(builder: Any, left: Any, right: Any) -> Any:
    """left / right."""
    return builder.fdiv(left, right)


@operation(vector, vector, vector, vector)
def fma(builder: Any, left: Any, right: Any, addend: Any) -> Any:
    """left * right + addend, rounded once."""
    return fused(builder, left, right, addend)


@operation(vector, vector, vector, vector)
def where_negative(builder: Any, value: Any, negative: Any, other: Any) -> Any:
    """`negative` where value < 0, else `other`."""
    return builder.select(builder.fcmp_ordered("<", value, constant(_FLOATS, 0.0)), negative, other)


@operation(vector, vector)
def negate(builder: Any, value: Any) -> Any:
    """-value."""
    return builder.fneg(value)


@operation(vector, vector, vector)
def maximum(builder: Any, left: Any, right: Any) -> Any:
    """The larger of each lane; right where one is NaN."""
    return _larger(builder, left, right)


@operation(float32, vector)
def max_lanes(builder: Any, value: Any) -> Any:
    """The largest lane."""
    return _fold(builder, value, lambda left, right: _larger(builder, left, right))


@operation(float32, vector)
def sum_lanes(builder: Any, value: Any) -> Any:
    """The sum of all lanes, in a fixed order."""
    return _fold(builder, value, builder.fadd)


@operation(vector, vector, int64, int64)
def keep_lanes(builder: Any, value: Any, start: Any, end: Any) -> Any:
    """Lanes start <= lane < end of `value`, minus infinity in the others."""
    kept = builder.and_(_lanes_below(builder, end), builder.not_(_lanes_below(builder, start)))
    return builder.select(kept, value, constant(_FLOATS, float("-inf")))


@operation(vector, vector)
def exp2(builder: Any, x: Any) -> Any:
    """2**x for x below 127, to a relative 1e-7; 0 below -126."""
    clamped = _larger(builder, constant(_FLOATS, -126.0), x)
    # The nearest integer n appears in the low bits of x + 1.5 * 2**23; the rest is a polynomial on [-0.5, 0.5].
    magic = constant(_FLOATS, 12582912.0)
    shifted = builder.fadd(clamped, magic)
    rest = builder.fsub(clamped, builder.fsub(shifted, magic))
    y = constant(_FLOATS, 1.5403530393381609954e-4)
    for coefficient in (
        1.3333558146428443423e-3,
        9.6181291076284771619e-3,
        5.5504108664821579953e-2,
        2.4022650695910071233e-1,
        6.9314718055994530942e-1,
        1.0,
    ):
        y = fused(builder, y, rest, constant(_FLOATS, coefficient))
    exponent = builder.add(builder.bitcast(shifted, _WORDS), constant(_WORDS, 127))
    power = builder.bitcast(builder.shl(exponent, constant(_WORDS, 23)), _FLOATS)
    underflow = builder.fcmp_ordered("<", x, constant(_FLOATS, -126.0))
    return builder.select(underflow, constant(_FLOATS, 0.0), builder.fmul(y, power))


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen rows of sixteen lanes to sixteen columns: exchange the off-diagonal quarters of ever smaller squares."""
    rows = list(rows)
    width = LANES // 2
    while width:
        low = [lane if lane & width == 0 else lane + LANES - width for lane in range(LANES)]
        high = [lane + width if lane & width == 0 else lane + LANES for lane in range(LANES)]
        for row in range(LANES):
            if row & width == 0:
                upper, lower = rows[row], rows[row + width]
                rows[row] = builder.shuffle_vector(upper, lower, ir.Constant(_WORDS, low))
                rows[row + width] = builder.shuffle_vector(upper, lower, ir.Constant(_WORDS, high))
        width //= 2
    return rows


def _columns(unpack: Callable[[Any, Any], list[Any]], per_word: int) -> Callable[..., None]:
    """Transpose from memory, in words of `per_word` items; `unpack(builder, words)` makes them float32 vectors."""

    @operation(none, int64, int64, int64, int64, int64)
    def columns(builder: Any, addresses: Any, offset: Any, count: Any, target: Any, target_stride: Any) -> None:
        num_words = builder.sdiv(
            builder.add(count, ir.Constant(count.type, per_word - 1)), ir.Constant(count.type, per_word)
        )
        rows = []
        for row in range(LANES):
            place = pointer(builder, addresses, ir.IntType(64), ir.Constant(_I32, row))
            address = builder.add(builder.load(place, align=8, typ=ir.IntType(64)), offset)
            rows.append(_read_first(builder, address, num_words, _WORDS, "v16i32", 4 // per_word))
        for number, words in enumerate(_transpose(builder, rows)):
            for part, value in enumerate(unpack(builder, words)):
                row = ir.Constant(target.type, number * per_word + part)
                address = builder.add(target, builder.mul(target_stride, row))
                builder.store(value, pointer(builder, address, _FLOATS), align=4)

    function: Callable[..., None] = columns
    return function


def _unpack_float32(builder: Any, words: Any) -> list[Any]:
    return [builder.bitcast(words, _FLOATS)]


def _unpack_bfloat16(builder: Any, words: Any) -> list[Any]:
    low = builder.shl(words, constant(_WORDS, 16))
    high = builder.and_(words, constant(_WORDS, 0xFFFF0000))
    return [builder.bitcast(low, _FLOATS), builder.bitcast(high, _FLOATS)]


def _unpack_float16(builder: Any, words: Any) -> list[Any]:
    low = builder.trunc(words, _HALVES)
    high = builder.trunc(builder.lshr(words, constant(_WORDS, 16)), _HALVES)
    return [_from_float16(builder, low), _from_float16(builder, high)]


_columns_float32 = _columns(_unpack_float32, 1)
_columns_bfloat16 = _columns(_unpack_bfloat16, 2)
_columns_float16 = _columns(_unpack_float16, 2)


@operation(none, int64)
def prefetch(builder: Any, address: Any) -> None:
    """Ask for a cache line, into the second-level cache."""
    read, level_2, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer(builder, address, _F32), read, level_2, data)


@operation(float32, int64, int64)
def get_float32(builder: Any, address: Any, index: Any) -> Any:
    """Item `index` of a float32 array."""
    return builder.load(pointer(builder, address, _F32, index), align=4, typ=_F32)


@operation(none, int64, int64, float32)
def set_float32(builder: Any, address: Any, index: Any, value: Any) -> None:
    """Write item `index` of a float32 array."""
    builder.store(value, pointer(builder, address, _F32, index), align=4)


@operation(int64, int64, int64)
def get_int32(builder: Any, address: Any, index: Any) -> Any:
    """Item `index` of an int32 array."""
    value = builder.load(pointer(builder, address, _I32, index), align=4, typ=_I32)
    return builder.sext(value, ir.IntType(64))


@operation(int64, int64, int64)
def get_int64(builder: Any, address: Any, index: Any) -> Any:
    """Item `index` of an int64 array."""
    return builder.load(pointer(builder, address, ir.IntType(64), index), align=8, typ=ir.IntType(64))


@operation(none, int64, int64, int64)
def set_int64(builder: Any, address: Any, index: Any, value: Any) -> None:
    """Write item `index` of an int64 array."""
    builder.store(value, pointer(builder, address, ir.IntType(64), index), align=8)


@operation(int64, int64, int64, int64)
def fetch_add(builder: Any, address: Any, index: Any, amount: Any) -> Any:
    """Add to item `index` of an int64 array, as one atomic step; the value before."""
    return builder.atomic_rmw("add", pointer(builder, address, ir.IntType(64), index), amount, "seq_cst")


@inner
def widen(dtype: int, source: int, target: int, count: int) -> None:
    """`count` numbers of `dtype` to float32, padded with zeros to a multiple of 16."""
    whole = count - count % LANES
    rest = count - whole
    if dtype == FLOAT32:
        for i in range(0, whole, LANES):
            store(target + 4 * i, load(source + 4 * i))
        if rest:
            store(target + 4 * whole, load_first(source + 4 * whole, rest))
    elif dtype == BFLOAT16:
        for i in range(0, whole, LANES):
            store(target + 4 * i, _load_bfloat16(source + 2 * i))
        if rest:
            store(target + 4 * whole, _load_first_bfloat16(source + 2 * whole, rest))
    else:
        for i in range(0, whole, LANES):
            store(target + 4 * i, _load_float16(source + 2 * i))
        if rest:
            store(target + 4 * whole, _load_first_float16(source + 2 * whole, rest))


@inner
def narrow(dtype: int, source: int, target: int, count: int) -> None:
    """`count` float32 to `dtype`, rounded to nearest, ties to even."""
    whole = count - count % LANES
    rest = count - whole
    if dtype == FLOAT32:
        for i in range(0, whole, LANES):
            store(target + 4 * i, load(source + 4 * i))
        if rest:
            store_first(target + 4 * whole, load(source + 4 * whole), rest)
    elif dtype == BFLOAT16:
        for i in range(0, whole, LANES):
            _store_bfloat16(target + 2 * i, load(source + 4 * i))
        if rest:
            _store_first_bfloat16(target + 2 * whole, load(source + 4 * whole), rest)
    else:
        for i in range(0, whole, LANES):
            _store_float16(target + 2 * i, load(source + 4 * i))
        if rest:
            _store_first_float16(target + 2 * whole, load(source + 4 * whole), rest)


@inner
def widen_columns(dtype: int, addresses: int, target: int, target_stride: int, count: int) -> None:
    """Column r of target[count, 16] in float32 = `count` numbers of `dtype` at the r-th of sixteen addresses.

    Rows of the target lie `target_stride` bytes apart; up to the next multiple of 32 they are written too.
    """
    if dtype == FLOAT32:
        for i in range(0, count, LANES):
            _columns_float32(addresses, 4 * i, count - i, target + i * target_stride, target_stride)
    elif dtype == BFLOAT16:
        for i in range(0, count, 2 * LANES):
            _columns_bfloat16(addresses, 2 * i, count - i, target + i * target_stride, target_stride)
    else:
        for i in range(0, count, 2 * LANES):
            _columns_float16(addresses, 2 * i, count - i, target + i * target_stride, target_stride)
