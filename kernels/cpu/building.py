"""What emitting functions take from numba: places on the stack, loops. It is imported only while something compiles."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


def alloca_once(builder: Any, form: Any) -> Any:
    """A place for a value of this type, at the function's beginning."""
    from numba.core import cgutils

    return cgutils.alloca_once(builder, form)  # type: ignore[no-untyped-call]


def alloca_once_value(builder: Any, value: Any) -> Any:
    """A place that holds `value` from here on."""
    from numba.core import cgutils

    return cgutils.alloca_once_value(builder, value)  # type: ignore[no-untyped-call]


def for_range(builder: Any, count: Any) -> AbstractContextManager[Any]:
    """A loop of `count` turns; its `index` is the turn's number."""
    from numba.core import cgutils

    loop: AbstractContextManager[Any] = cgutils.for_range(builder, count)
    return loop
