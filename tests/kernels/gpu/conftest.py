"""These tests run kernels in Triton's interpreter, in a process of their own: it is chosen before triton is imported.

`tests/kernels/test_triton_kernels.py` starts that process; by hand: `TRITON_INTERPRET=1 pytest tests/kernels/gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["*.py"]

if INTERPRETED:
    import torch
    from support import triton_interpreter

    torch.set_num_threads(1)
    triton_interpreter.install()


@pytest.fixture(autouse=True)
def quiet_arithmetic() -> Iterator[None]:
    """A GPU does not warn of exp(200) or -inf - -inf; what comes of them is what the tests look at."""
    with np.errstate(all="ignore"):
        yield
