"""Compile the CPU operations once, when the package is installed: `python -m aiexport_edge.kernels.warm`.

Without it the first process that needs them compiles them itself, some seconds long.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path

OPERATIONS = ("norm", "swiglu", "rope", "attention", "sampler", "gather", "lora", "program")


def warm() -> Path:
    """Compile what is not compiled yet, and load all of it. Where the machine code lies."""
    for name in OPERATIONS:
        importlib.import_module(f"aiexport_edge.kernels.cpu.{name}")
    from aiexport_edge.kernels.cpu import dot
    from aiexport_edge.kernels.cpu.jit import CACHE_DIRECTORY

    if dot.HAS_BFLOAT16 or dot.HAS_INT8:
        importlib.import_module("aiexport_edge.kernels.cpu.packed_weight")
        importlib.import_module("aiexport_edge.kernels.cpu.int4_products")
    return CACHE_DIRECTORY


if __name__ == "__main__":
    start = time.perf_counter()
    directory = warm()
    print(f"CPU operations ready in {time.perf_counter() - start:.1f} s ({directory})")
