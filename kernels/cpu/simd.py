"""Sixteen float32 at a time: the vector type that kernels are written in, and its arithmetic.

LLVM splits the vectors into whatever registers the processor has. Every operation rounds as written and sums run in a
fixed order, so a result has the same bits whichever loop or thread computes it. Knows no operation of a model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
from llvmlite import ir

from aiexport_edge.kernels.cpu.jit import Inline, host_features

LANES = 16

I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, WORDS, HALVES, LONGS = (ir.VectorType(item, LANES) for item in (F32, I32, I16, I64))

FEATURES = frozenset(host_features().replace("+", "").split(","))
IS_X86 = llvmlite.binding.get_process_triple().startswith("x86_64")
HAS_FMA = not IS_X86 or "fma" in FEATURES


# What values are, by the names of numba's types: those themselves exist only while something is compiled.
vector, int64, float32, float64, none = "Float32x16", "int64", "float32", "float64", "none"


def _type_named(name: str) -> Any:
    from numba.core import types

    return _vector_type() if name == vector else getattr(types, name)


@functools.cache
def _vector_type() -> Any:
    """numba's type of a vector. It lives inside kernels only."""
    from numba.core import types
    from numba.extending import models, register_model

    class Float32x16(types.Type):
        def __init__(self) -> None:
            super().__init__(name=vector)

    @register_model(Float32x16)
    class _Model(models.PrimitiveModel):
        def __init__(self, manager: Any, numba_type: Any) -> None:
            super().__init__(manager, numba_type, FLOATS)  # type: ignore[no-untyped-call]

    return Float32x16()


def operation(result: str, *parameters: str) -> Callable[[Callable[..., Any]], Any]:
    """Make `emit(builder, *values) -> value or None`, which writes LLVM code, a function that kernels can call."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def typer(_context: Any, *_arguments: Any) -> Any:
            def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
                value = emit(builder, *values)
                return context.get_dummy_value() if value is None else value

            return _type_named(result)(*map(_type_named, parameters)), generate

        typer.__name__, typer.__doc__ = emit.__name__, emit.__doc__
        # Named parameters, since numba would see *arguments as one tuple.
        typer.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
        return Inline(typer)

    return decorate


# --- What emitting functions are made of ---


def constant(form: Any, value: float) -> Any:
    """A vector of one number."""
    return ir.Constant(form, [value] * LANES)


def broadcast(builder: Any, value: Any, form: Any) -> Any:
    """A vector of one scalar value."""
    single = builder.insert_element(ir.Constant(form, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(single, single, constant(WORDS, 0))


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call an LLVM intrinsic by its full name."""
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [value.type for value in arguments]), name)
    return builder.call(function, arguments)


def lanes_below(builder: Any, count: Any) -> Any:
    """Mask of the lanes whose number is less than `count` (int64)."""
    lanes = ir.Constant(WORDS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, broadcast(builder, builder.trunc(count, I32), WORDS))


def fused(builder: Any, left: Any, right: Any, addend: Any) -> Any:
    """left * right + addend, rounded once; twice on a processor that cannot."""
    if not HAS_FMA:
        return builder.fadd(builder.fmul(left, right), addend)
    return call(builder, "llvm.fma.v16f32", FLOATS, left, right, addend)


def larger(builder: Any, left: Any, right: Any) -> Any:
    """The larger of each lane; right where one is NaN."""
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


def _fold(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine all lanes into one scalar: upper half with lower half, and so on."""
    width = LANES // 2
    while width:
        upper = ir.Constant(WORDS, [(lane + width) % LANES for lane in range(LANES)])
        value = combine(value, builder.shuffle_vector(value, value, upper))
        width //= 2
    return builder.extract_element(value, ir.Constant(I32, 0))


# --- Operations ---


@operation(vector, float32)
def splat(builder: Any, value: Any) -> Any:
    """One number in all lanes."""
    return broadcast(builder, value, FLOATS)


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
    """left * right + addend, as `fused` rounds it."""
    return fused(builder, left, right, addend)


@operation(vector, vector, vector, vector)
def where_negative(builder: Any, value: Any, negative: Any, other: Any) -> Any:
    """`negative` where value < 0, else `other`."""
    return builder.select(builder.fcmp_ordered("<", value, constant(FLOATS, 0.0)), negative, other)


@operation(vector, vector)
def negate(builder: Any, value: Any) -> Any:
    """-value."""
    return builder.fneg(value)


@operation(vector, vector)
def absolute(builder: Any, value: Any) -> Any:
    """|value|."""
    return call(builder, "llvm.fabs.v16f32", FLOATS, value)


@operation(vector, vector, vector)
def maximum(builder: Any, left: Any, right: Any) -> Any:
    """The larger of each lane; right where one is NaN."""
    return larger(builder, left, right)


@operation(float32, vector)
def max_lanes(builder: Any, value: Any) -> Any:
    """The largest lane."""
    return _fold(builder, value, lambda left, right: larger(builder, left, right))


@operation(float32, vector)
def sum_lanes(builder: Any, value: Any) -> Any:
    """The sum of all lanes, in a fixed order."""
    return _fold(builder, value, builder.fadd)


@operation(vector, vector, int64, int64)
def keep_lanes(builder: Any, value: Any, start: Any, end: Any) -> Any:
    """Lanes start <= lane < end of `value`, minus infinity in the others."""
    kept = builder.and_(lanes_below(builder, end), builder.not_(lanes_below(builder, start)))
    return builder.select(kept, value, constant(FLOATS, float("-inf")))


@operation(vector, vector)
def exp2(builder: Any, x: Any) -> Any:
    """2**x for x below 127, to a relative 1e-7; 0 below -126."""
    clamped = larger(builder, constant(FLOATS, -126.0), x)
    # The nearest integer n appears in the low bits of x + 1.5 * 2**23; the rest is a polynomial on [-0.5, 0.5].
    magic = constant(FLOATS, 12582912.0)
    shifted = builder.fadd(clamped, magic)
    rest = builder.fsub(clamped, builder.fsub(shifted, magic))
    y = constant(FLOATS, 1.5403530393381609954e-4)
    for coefficient in (
        1.3333558146428443423e-3,
        9.6181291076284771619e-3,
        5.5504108664821579953e-2,
        2.4022650695910071233e-1,
        6.9314718055994530942e-1,
        1.0,
    ):
        y = fused(builder, y, rest, constant(FLOATS, coefficient))
    exponent = builder.add(builder.bitcast(shifted, WORDS), constant(WORDS, 127))
    power = builder.bitcast(builder.shl(exponent, constant(WORDS, 23)), FLOATS)
    underflow = builder.fcmp_ordered("<", x, constant(FLOATS, -126.0))
    return builder.select(underflow, constant(FLOATS, 0.0), builder.fmul(y, power))
