"""What kernels are called with: codes of dtypes, and units of work that threads share (`kernels.threads.launch`)."""

from __future__ import annotations

import torch

from aiexport_edge.kernels.cpu.jit import inner
from aiexport_edge.kernels.cpu.memory import BFLOAT16, E4M3, FLOAT16, FLOAT32, fetch_add

DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
KV_DTYPES = DTYPES | {torch.float8_e4m3fn: E4M3, torch.uint8: E4M3}  # codes, where there are scales


@inner
def begin(control: int) -> int:
    """Say that this thread is at work; the first unit. The caller's memory may be read only if there is one."""
    fetch_add(control, 1, 1)
    unit: int = fetch_add(control, 0, 1)
    return unit


@inner
def next_unit(control: int) -> int:
    """A unit that no thread has taken yet."""
    unit: int = fetch_add(control, 0, 1)
    return unit


@inner
def end(control: int) -> None:
    """Say that this thread is done."""
    fetch_add(control, 1, -1)
