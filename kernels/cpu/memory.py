"""What kernels do with memory: items, vectors, rows of any of three dtypes to and from float32.

Addresses are int64, in bytes; a dtype is one of the codes `FLOAT32`, `BFLOAT16`, `FLOAT16`,
`E4M3` (8 bits, of keys and values only). Knows no operation of a
model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from aiexport_edge.kernels.cpu.jit import inner
from aiexport_edge.kernels.cpu.simd import (
    F32,
    FEATURES,
    FLOATS,
    HALVES,
    I32,
    I64,
    IS_X86,
    LANES,
    WORDS,
    call,
    constant,
    float32,
    float64,
    int64,
    lanes_below,
    none,
    operation,
    vector,
)

FLOAT32, BFLOAT16, FLOAT16, E4M3 = 0, 1, 2, 3

_HAS_FLOAT16 = not IS_X86 or "f16c" in FEATURES
OCTETS = ir.VectorType(ir.IntType(8), LANES)
_FLOATS_16 = ir.VectorType(ir.HalfType(), LANES)


def pointer(builder: Any, address: Any, item: Any, index: Any = None) -> Any:
    """Pointer to the array of `item` at `address`, or to item `index` of it."""
    base = builder.inttoptr(address, ir.PointerType(item))
    return base if index is None else builder.gep(base, [index], source_etype=item)


def read(builder: Any, address: Any, form: Any = FLOATS) -> Any:
    """A vector in memory, at any multiple of its items' size."""
    align = {HALVES: 2, OCTETS: 1}.get(form, 4)
    return builder.load(pointer(builder, address, form), align=align, typ=form)


# --- 16-bit floats ---


def _from_bfloat16(builder: Any, halves: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(halves, WORDS), constant(WORDS, 16)), FLOATS)


def _to_bfloat16(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even; a NaN stays one."""
    bits = builder.bitcast(value, WORDS)
    rounded = builder.add(builder.add(bits, constant(WORDS, 0x7FFF)), _bit(builder, bits, 16))
    rounded = builder.select(_is_nan(builder, value), constant(WORDS, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, constant(WORDS, 16)), HALVES)


def _bit(builder: Any, bits: Any, number: int) -> Any:
    return builder.and_(builder.lshr(bits, constant(WORDS, number)), constant(WORDS, 1))


def _is_nan(builder: Any, value: Any) -> Any:
    return builder.fcmp_unordered("uno", value, value)


def _from_float16(builder: Any, halves: Any) -> Any:
    if _HAS_FLOAT16:
        return builder.fpext(builder.bitcast(halves, _FLOATS_16), FLOATS)
    words = builder.zext(halves, WORDS)
    sign = builder.shl(builder.and_(words, constant(WORDS, 0x8000)), constant(WORDS, 16))
    rest = builder.and_(words, constant(WORDS, 0x7FFF))
    # The exponent is 112 less than a float32's: a product mends it, for denormals too.
    shifted = builder.bitcast(builder.shl(rest, constant(WORDS, 13)), FLOATS)
    finite = builder.bitcast(builder.fmul(shifted, constant(FLOATS, 2.0**112)), WORDS)
    is_finite = builder.icmp_unsigned("<", rest, constant(WORDS, 0x7C00))
    special = builder.or_(builder.bitcast(shifted, WORDS), constant(WORDS, 0x7F800000))
    return builder.bitcast(builder.or_(sign, builder.select(is_finite, finite, special)), FLOATS)


def _to_float16(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even; a NaN stays one."""
    if _HAS_FLOAT16:
        return builder.bitcast(builder.fptrunc(value, _FLOATS_16), HALVES)
    bits = builder.bitcast(value, WORDS)
    sign = builder.lshr(builder.and_(bits, constant(WORDS, 0x80000000)), constant(WORDS, 16))
    size = builder.and_(bits, constant(WORDS, 0x7FFFFFFF))
    normal = builder.add(builder.sub(size, constant(WORDS, 112 << 23)), constant(WORDS, 0xFFF))
    normal = builder.lshr(builder.add(normal, _bit(builder, size, 13)), constant(WORDS, 13))
    # Below 2**-14 the sum with 0.5 leaves the rounded denormal in its low bits.
    small = builder.fadd(builder.bitcast(size, FLOATS), constant(FLOATS, 0.5))
    small = builder.sub(builder.bitcast(small, WORDS), constant(WORDS, 0x3F000000))
    half = builder.select(builder.icmp_unsigned("<", size, constant(WORDS, 113 << 23)), small, normal)
    too_large = builder.icmp_unsigned(">=", size, constant(WORDS, 0x477FF000))
    half = builder.select(too_large, constant(WORDS, 0x7C00), half)
    half = builder.select(_is_nan(builder, value), constant(WORDS, 0x7E00), half)
    return builder.trunc(builder.or_(sign, half), HALVES)


# --- 8-bit floats: E4M3 has bias 7, no infinities, and 448 is the largest ---


def _from_e4m3(builder: Any, octets: Any) -> Any:
    """Exact. The exponent is 120 less than a float32's: a product mends it, for denormals too."""
    words = builder.zext(octets, WORDS)
    sign = builder.shl(builder.and_(words, constant(WORDS, 0x80)), constant(WORDS, 24))
    rest = builder.shl(builder.and_(words, constant(WORDS, 0x7F)), constant(WORDS, 20))
    return builder.fmul(builder.bitcast(builder.or_(sign, rest), FLOATS), constant(FLOATS, 2.0**120))


def _to_e4m3(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even; beyond 448 it saturates."""
    bits = builder.bitcast(value, WORDS)
    sign = builder.lshr(builder.and_(bits, constant(WORDS, 0x80000000)), constant(WORDS, 24))
    size = builder.bitcast(builder.and_(bits, constant(WORDS, 0x7FFFFFFF)), FLOATS)
    is_large = builder.fcmp_unordered("ugt", size, constant(FLOATS, 448.0))
    size = builder.select(is_large, constant(FLOATS, 448.0), size)
    wide = builder.bitcast(size, WORDS)
    normal = builder.add(builder.add(wide, constant(WORDS, 0x7FFFF)), _bit(builder, wide, 20))
    normal = builder.sub(builder.lshr(normal, constant(WORDS, 20)), constant(WORDS, (127 - 7) << 3))
    # Below 2**-6 codes are multiples of 2**-9: the sum's low bits are the rounded integer.
    small = builder.fadd(builder.fmul(size, constant(FLOATS, 512.0)), constant(FLOATS, 12582912.0))
    small = builder.and_(builder.bitcast(small, WORDS), constant(WORDS, 0xF))
    is_small = builder.fcmp_ordered("<", size, constant(FLOATS, 2.0**-6))
    return builder.trunc(builder.or_(sign, builder.select(is_small, small, normal)), OCTETS)


# --- Vectors in memory ---


@dataclass(frozen=True, slots=True)
class _Storage:
    """How sixteen numbers lie in memory. `unpack_words`: the numbers of sixteen 32-bit words, by place in the word."""

    form: Any
    suffix: str
    item_bytes: int
    unpack: Callable[[Any, Any], Any]
    pack: Callable[[Any, Any], Any]
    unpack_words: Callable[[Any, Any], list[Any]]


def _low_and_high(builder: Any, words: Any) -> tuple[Any, Any]:
    return builder.trunc(words, HALVES), builder.trunc(builder.lshr(words, constant(WORDS, 16)), HALVES)


_AS_FLOAT32 = _Storage(
    FLOATS, "v16f32", 4, lambda _, v: v, lambda _, v: v, lambda builder, words: [builder.bitcast(words, FLOATS)]
)
_AS_BFLOAT16 = _Storage(
    HALVES,
    "v16i16",
    2,
    _from_bfloat16,
    _to_bfloat16,
    lambda builder, words: [
        builder.bitcast(builder.shl(words, constant(WORDS, 16)), FLOATS),
        builder.bitcast(builder.and_(words, constant(WORDS, 0xFFFF0000)), FLOATS),
    ],
)
_AS_FLOAT16 = _Storage(
    HALVES,
    "v16i16",
    2,
    _from_float16,
    _to_float16,
    lambda builder, words: [_from_float16(builder, half) for half in _low_and_high(builder, words)],
)
_AS_E4M3 = _Storage(
    OCTETS,
    "v16i8",
    1,
    _from_e4m3,
    _to_e4m3,
    lambda builder, words: [
        _from_e4m3(builder, builder.trunc(builder.lshr(words, constant(WORDS, 8 * place)), OCTETS))
        for place in range(4)
    ],
)


def _read_first(builder: Any, address: Any, count: Any, form: Any, suffix: str, item_bytes: int) -> Any:
    """The first `count` items of a vector, zero in the other lanes; nothing past them is touched."""
    arguments = pointer(builder, address, form), ir.Constant(I32, item_bytes), lanes_below(builder, count)
    return call(builder, f"llvm.masked.load.{suffix}.p0", form, *arguments, constant(form, 0))


def _loader(storage: _Storage) -> Any:
    @operation(vector, int64)
    def load(builder: Any, address: Any) -> Any:
        """Sixteen numbers from memory."""
        return storage.unpack(builder, read(builder, address, storage.form))

    return load


def _first_loader(storage: _Storage) -> Any:
    @operation(vector, int64, int64)
    def load_first(builder: Any, address: Any, count: Any) -> Any:
        """`count` numbers from memory, zero in the other lanes."""
        packed = _read_first(builder, address, count, storage.form, storage.suffix, storage.item_bytes)
        return storage.unpack(builder, packed)

    return load_first


def _storer(storage: _Storage) -> Any:
    @operation(none, int64, vector)
    def store(builder: Any, address: Any, value: Any) -> None:
        """Sixteen numbers to memory."""
        builder.store(storage.pack(builder, value), pointer(builder, address, storage.form), align=storage.item_bytes)

    return store


def _first_storer(storage: _Storage) -> Any:
    @operation(none, int64, vector, int64)
    def store_first(builder: Any, address: Any, value: Any, count: Any) -> None:
        """The first `count` lanes to memory."""
        packed, place = storage.pack(builder, value), pointer(builder, address, storage.form)
        arguments = packed, place, ir.Constant(I32, storage.item_bytes), lanes_below(builder, count)
        call(builder, f"llvm.masked.store.{storage.suffix}.p0", ir.VoidType(), *arguments)

    return store_first


load, load_first = _loader(_AS_FLOAT32), _first_loader(_AS_FLOAT32)
store, store_first = _storer(_AS_FLOAT32), _first_storer(_AS_FLOAT32)
_load_bfloat16, _load_first_bfloat16 = _loader(_AS_BFLOAT16), _first_loader(_AS_BFLOAT16)
_store_bfloat16, _store_first_bfloat16 = _storer(_AS_BFLOAT16), _first_storer(_AS_BFLOAT16)
_load_float16, _load_first_float16 = _loader(_AS_FLOAT16), _first_loader(_AS_FLOAT16)
_store_float16, _store_first_float16 = _storer(_AS_FLOAT16), _first_storer(_AS_FLOAT16)

_load_e4m3, _load_first_e4m3 = _loader(_AS_E4M3), _first_loader(_AS_E4M3)
_store_e4m3, _store_first_e4m3 = _storer(_AS_E4M3), _first_storer(_AS_E4M3)


def _either(builder: Any, is_bfloat16: Any, single: Callable[[], Any], half: Callable[[], Any]) -> Any:
    """`single()`, or `half()` where `is_bfloat16` is not 0: a loop in which that does not change is made twice."""
    with builder.if_else(builder.icmp_signed("==", is_bfloat16, ir.Constant(I64, 0))) as (then, otherwise):
        with then:
            found, from_single = single(), builder.block
        with otherwise:
            widened, from_half = half(), builder.block
    value = builder.phi(FLOATS)
    value.add_incoming(found, from_single)
    value.add_incoming(widened, from_half)
    return value


@operation(vector, int64, int64)
def load_either(builder: Any, is_bfloat16: Any, address: Any) -> Any:
    """Sixteen numbers from memory, float32 or bfloat16."""
    return _either(
        builder,
        is_bfloat16,
        lambda: read(builder, address, FLOATS),
        lambda: _from_bfloat16(builder, read(builder, address, HALVES)),
    )


@operation(vector, int64, int64, int64)
def load_first_either(builder: Any, is_bfloat16: Any, address: Any, count: Any) -> Any:
    """`count` numbers from memory, float32 or bfloat16; zero in the other lanes."""
    single, half = _AS_FLOAT32, _AS_BFLOAT16
    return _either(
        builder,
        is_bfloat16,
        lambda: _read_first(builder, address, count, FLOATS, single.suffix, single.item_bytes),
        lambda: _from_bfloat16(builder, _read_first(builder, address, count, HALVES, half.suffix, half.item_bytes)),
    )


def transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen rows of sixteen lanes to sixteen columns: exchange the off-diagonal quarters of ever smaller squares."""
    rows = list(rows)
    width = LANES // 2
    while width:
        low = [lane if lane & width == 0 else lane + LANES - width for lane in range(LANES)]
        high = [lane + width if lane & width == 0 else lane + LANES for lane in range(LANES)]
        for row in range(LANES):
            if row & width == 0:
                upper, lower = rows[row], rows[row + width]
                rows[row] = builder.shuffle_vector(upper, lower, ir.Constant(WORDS, low))
                rows[row + width] = builder.shuffle_vector(upper, lower, ir.Constant(WORDS, high))
        width //= 2
    return rows


def _transposer(storage: _Storage) -> Any:
    per_word = 4 // storage.item_bytes

    @operation(none, int64, int64, int64, int64, int64)
    def columns(builder: Any, addresses: Any, offset: Any, count: Any, target: Any, target_stride: Any) -> None:
        """Row i of the target: number i of each of sixteen rows, `offset` bytes into them; `count` exist."""
        num_words = builder.sdiv(builder.add(count, ir.Constant(I64, per_word - 1)), ir.Constant(I64, per_word))
        rows = []
        for row in range(LANES):
            place = pointer(builder, addresses, I64, ir.Constant(I32, row))
            address = builder.add(builder.load(place, align=8, typ=I64), offset)
            rows.append(_read_first(builder, address, num_words, WORDS, "v16i32", storage.item_bytes))
        for number, words in enumerate(transpose(builder, rows)):
            for part, value in enumerate(storage.unpack_words(builder, words)):
                row_offset = builder.mul(target_stride, ir.Constant(I64, number * per_word + part))
                builder.store(value, pointer(builder, builder.add(target, row_offset), FLOATS), align=4)

    return columns


_columns_float32, _columns_bfloat16 = _transposer(_AS_FLOAT32), _transposer(_AS_BFLOAT16)
_columns_float16, _columns_e4m3 = _transposer(_AS_FLOAT16), _transposer(_AS_E4M3)


@operation(none, int64)
def prefetch(builder: Any, address: Any) -> None:
    """Ask for a cache line, into the second-level cache."""
    read_only, level_2, data = (ir.Constant(I32, value) for value in (0, 2, 1))
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer(builder, address, F32), read_only, level_2, data)


# --- Items in memory ---


@operation(float32, int64, int64)
def get_float32(builder: Any, address: Any, index: Any) -> Any:
    """Item `index` of a float32 array."""
    return builder.load(pointer(builder, address, F32, index), align=4, typ=F32)


@operation(none, int64, int64, float32)
def set_float32(builder: Any, address: Any, index: Any, value: Any) -> None:
    """Write item `index` of a float32 array."""
    builder.store(value, pointer(builder, address, F32, index), align=4)


@operation(int64, int64, int64)
def get_int32(builder: Any, address: Any, index: Any) -> Any:
    """Item `index` of an int32 array."""
    return builder.sext(builder.load(pointer(builder, address, I32, index), align=4, typ=I32), I64)


@operation(int64, int64, int64)
def get_int64(builder: Any, address: Any, index: Any) -> Any:
    """Item `index` of an int64 array."""
    return builder.load(pointer(builder, address, I64, index), align=8, typ=I64)


@operation(none, int64, int64, int64)
def set_int64(builder: Any, address: Any, index: Any, value: Any) -> None:
    """Write item `index` of an int64 array."""
    builder.store(value, pointer(builder, address, I64, index), align=8)


@operation(float64, int64)
def as_float(builder: Any, bits: Any) -> Any:
    """The float64 of these bits (`threads.float_bits`)."""
    return builder.bitcast(bits, ir.DoubleType())


@operation(int64, int64, int64, int64)
def fetch_add(builder: Any, address: Any, index: Any, amount: Any) -> Any:
    """Add to item `index` of an int64 array, as one atomic step; the value before."""
    return builder.atomic_rmw("add", pointer(builder, address, I64, index), amount, "seq_cst")


# --- Rows of any dtype ---


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
    elif dtype == E4M3:
        for i in range(0, whole, LANES):
            store(target + 4 * i, _load_e4m3(source + i))
        if rest:
            store(target + 4 * whole, _load_first_e4m3(source + whole, rest))
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
    elif dtype == E4M3:
        for i in range(0, whole, LANES):
            _store_e4m3(target + i, load(source + 4 * i))
        if rest:
            _store_first_e4m3(target + whole, load(source + 4 * whole), rest)
    else:
        for i in range(0, whole, LANES):
            _store_float16(target + 2 * i, load(source + 4 * i))
        if rest:
            _store_first_float16(target + 2 * whole, load(source + 4 * whole), rest)


@inner
def widen_columns(dtype: int, addresses: int, target: int, target_stride: int, count: int) -> None:
    """Column r of target[count, 16] in float32 = `count` numbers of `dtype` at the r-th of sixteen addresses.

    Rows of the target lie `target_stride` bytes apart; up to the next multiple of 32, of 64 for `E4M3`, they are
    written too.
    """
    if dtype == FLOAT32:
        for i in range(0, count, LANES):
            _columns_float32(addresses, 4 * i, count - i, target + i * target_stride, target_stride)
    elif dtype == BFLOAT16:
        for i in range(0, count, 2 * LANES):
            _columns_bfloat16(addresses, 2 * i, count - i, target + i * target_stride, target_stride)
    elif dtype == E4M3:
        for i in range(0, count, 4 * LANES):
            _columns_e4m3(addresses, i, count - i, target + i * target_stride, target_stride)
    else:
        for i in range(0, count, 2 * LANES):
            _columns_float16(addresses, 2 * i, count - i, target + i * target_stride, target_stride)
