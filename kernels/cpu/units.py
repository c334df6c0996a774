"""What kernels are called with: codes of dtypes, and units of work that threads share (`kernels.threads.launch`)."""

from __future__ import annotations

import torch

from aiexport_edge.kernels.cpu.jit import Array, inner
from aiexport_edge.kernels.cpu.simd import BFLOAT16, FLOAT16, FLOAT32, fetch_add

DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


@inner
def begin(control: Array) -> int:
    """Say that this thread is at work; the first unit.

    Allocate before, since that can fail; read the caller's memory after, and only if there is a unit to do.
    """
    fetch_add(control.ctypes.data, 1, 1)
    unit: int = fetch_add(control.ctypes.data, 0, 1)
    return unit


@inner
def next_unit(control: Array) -> int:
    """A unit that no thread has taken yet."""
    unit: int = fetch_add(control.ctypes.data, 0, 1)
    return unit


@inner
def keep(memory: Array) -> None:
    """Keep an array until here: numba frees it after its last mention, and knows nothing of addresses taken from it."""


@inner
def end(control: Array) -> None:
    """Say that this thread is done."""
    fetch_add(control.ctypes.data, 1, -1)
