"""SwiGLU. A unit of work is a few rows."""

from __future__ import annotations

import math

import numpy as np
import torch

from aiexport_edge.kernels.cpu.jit import kernel
from aiexport_edge.kernels.cpu.memory import load, narrow, store, widen
from aiexport_edge.kernels.cpu.simd import LANES, add, divide, exp2, multiply, negate, splat, where_negative
from aiexport_edge.kernels.cpu.units import DTYPES, begin, end, next_unit
from aiexport_edge.kernels.threads import empty, launch

ROWS_PER_UNIT = 4


@kernel
def swiglu_rows(
    control: int, scratch: int, num_units: int, gate_up: int, out: int, dtype: int, num_rows: int, width: int
) -> None:
    """Rows of 2 * width numbers to rows of width."""
    padded = (width + LANES - 1) // LANES * LANES
    gate, up = scratch, scratch + 4 * padded
    item = 4 if dtype == 0 else 2
    one, log2_e = splat(np.float32(1.0)), splat(np.float32(math.log2(math.e)))
    unit = begin(control)
    while unit < num_units:
        for row in range(unit * ROWS_PER_UNIT, min((unit + 1) * ROWS_PER_UNIT, num_rows)):
            widen(dtype, gate_up + 2 * row * width * item, gate, width)
            widen(dtype, gate_up + (2 * row + 1) * width * item, up, width)
            for i in range(0, width, LANES):
                x = load(gate + 4 * i)
                # exp(-|x|), which cannot overflow; the sigmoid is 1 / (1 + exp(-x)) = exp(x) / (exp(x) + 1)
                small = exp2(multiply(where_negative(x, x, negate(x)), log2_e))
                sigmoid = divide(where_negative(x, small, one), add(one, small))
                store(gate + 4 * i, multiply(multiply(x, sigmoid), load(up + 4 * i)))
            narrow(dtype, gate, out + row * width * item, width)
        unit = next_unit(control)
    end(control)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See `aiexport_edge.kernels.swiglu.swiglu_reference`."""
    gate_up = gate_up.contiguous()
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = empty((num_rows, width), gate_up.dtype)
    launch(
        swiglu_rows,
        -(-num_rows // ROWS_PER_UNIT),
        0.5 * num_rows * width,
        8 * (width + LANES),
        gate_up.data_ptr(),
        out.data_ptr(),
        DTYPES[gate_up.dtype],
        num_rows,
        width,
    )
    return out
