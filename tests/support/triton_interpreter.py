"""Makes Triton's interpreter tell the truth about bfloat16. `install()` after triton is imported, before a launch.

Triton 3.6 to 3.9 keep a bfloat16 block as its raw uint16 and let numpy compute on that. What is mended here:
- arithmetic, comparisons, `tl.where`, `tl.dot`, reductions and scans on bfloat16: done in float32, rounded once;
- conversions: float32 to bfloat16 truncates there; here, and on a GPU, it rounds to nearest, ties to even;
- `tl.dot` on float16: accumulated in float32, as the matrix units do, and by BLAS, which is far faster;
- bfloat16 constants where a version lacks them, and 3.6's `int(tensor)`, which numpy 2.4 refuses.
What stays hidden: races (programs run one after the other), loop-carried type changes, limits of an architecture, tf32
rounding, and masked loads without `other` (0 here, anything on a GPU). The ahead-of-time compile covers the types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def _is_bfloat16(handle: Any) -> bool:
    return not isinstance(handle.dtype, tl.pointer_type) and handle.dtype.scalar == tl.bfloat16


def _widen(bits: Any) -> Any:
    """uint16 bits of bfloat16 to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(np.shape(bits))


def _narrow(values: Any) -> Any:
    """float32 to the uint16 bits of the nearest bfloat16, ties to even."""
    wide = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.reshape(np.shape(values))).astype(np.uint16)


def _float32(handle: Any) -> Any:
    return Handle(_widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _mend_elementwise(name: str, num_operands: int) -> None:
    original = getattr(Builder, name)

    def mended(self: Any, *arguments: Any) -> Any:
        operands, operation = arguments[:num_operands], arguments[num_operands]
        if not any(_is_bfloat16(operand) for operand in operands):
            return original(self, *arguments)
        result = operation(*[_float32(operand).data for operand in operands])
        return Handle(result, tl.int1) if result.dtype == bool else Handle(_narrow(result), tl.bfloat16)

    setattr(Builder, name, mended)


def _mend_conversions() -> None:
    original_cast, original_float = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        if old == new == tl.bfloat16:
            return Handle(source.data, new)
        if new == tl.bfloat16:
            return Handle(_narrow(source.data.astype(np.float32)), new)
        if old == tl.bfloat16:
            return Handle(_widen(source.data).astype(interpreter._get_np_dtype(new)), new)
        return original_cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        if rounding is None:
            return Handle(source.data.astype(interpreter._get_np_dtype(target.scalar)), target.scalar)
        return original_float(self, source, target, rounding)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _mend_dot() -> None:
    original = Builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, max_imprecise: Any) -> Any:
        a, b = (
            Handle(handle.data.astype(np.float32), tl.float32)
            if handle.dtype.scalar == tl.float16
            else _float32(handle)
            for handle in (a, b)
        )
        if a.data.dtype == np.float32 and accumulator.data.dtype == np.float32:
            return Handle(np.matmul(a.data, b.data) + accumulator.data, accumulator.dtype.scalar)
        return original(self, a, b, accumulator, precision, max_imprecise)

    Builder.create_dot = create_dot


def _mend_reductions() -> None:
    def mended(original: Callable[..., Any]) -> Callable[..., Any]:
        def apply_impl(self: Any, blocks: Any) -> Any:
            several = blocks if isinstance(blocks, tuple | list) else (blocks,)
            if not any(block.dtype.scalar == tl.bfloat16 for block in several):
                return original(self, blocks)
            raise NotImplementedError("reduce bfloat16 in float32: kernels here always do")

        return apply_impl

    for operations in (interpreter.ReduceOps, interpreter.ScanOps):
        operations.apply_impl = mended(operations.apply_impl)


def _mend_index() -> None:
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


def install() -> None:
    """Mend this process' interpreter. Once."""
    for name, num_operands in (("binary_op", 2), ("ternary_op", 3), ("unary_op", 1)):
        _mend_elementwise(name, num_operands)
    _mend_conversions()
    _mend_dot()
    _mend_reductions()
    _mend_index()
    if not hasattr(Builder, "get_bf16"):
        Builder.get_bf16 = lambda self, value: Handle(_narrow(np.array([value], np.float32)), tl.bfloat16)
