"""RMS norm, with or without a residual sum before it. A unit of work is a few rows."""

from __future__ import annotations

import math

import numpy as np
import torch

from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.memory import as_float, load, narrow, store, widen
from aiexport_edge.kernels.cpu.simd import LANES, add, fma, multiply, splat, sum_lanes
from aiexport_edge.kernels.cpu.units import DTYPES, begin, end, next_unit
from aiexport_edge.kernels.threads import empty, float_bits, launch

ROWS_PER_UNIT = 8


@inner
def scale_row(row: int, weight: int, count: int, eps: float) -> None:
    """The float32 row, padded with zeros to a multiple of 16, times weight / sqrt(mean(row²) + eps)."""
    even, odd = splat(np.float32(0.0)), splat(np.float32(0.0))
    for i in range(0, count, 2 * LANES):
        x = load(row + 4 * i)
        even = fma(x, x, even)
        if i + LANES < count:
            y = load(row + 4 * (i + LANES))
            odd = fma(y, y, odd)
    mean = sum_lanes(add(even, odd)) / np.float32(count)
    scale = splat(np.float32(1.0) / math.sqrt(mean + np.float32(eps)))
    for i in range(0, count, LANES):
        store(row + 4 * i, multiply(multiply(load(row + 4 * i), scale), load(weight + 4 * i)))


@kernel
def norm_rows(
    control: int,
    scratch: int,
    num_units: int,
    x: int,
    residual: int,
    weight: int,
    out: int,
    total: int,
    dtype: int,
    weight_dtype: int,
    num_rows: int,
    width: int,
    eps_bits: int,
) -> None:
    """Rows of `width` numbers, one after the other; `residual` 0: none, and `total` is not written."""
    padded = (width + LANES - 1) // LANES * LANES
    row, other, wide_weight = scratch, scratch + 4 * padded, scratch + 8 * padded
    row_bytes = width * (4 if dtype == 0 else 2)
    unit = begin(control)
    if unit < num_units:
        widen(weight_dtype, weight, wide_weight, width)
    while unit < num_units:
        for number in range(unit * ROWS_PER_UNIT, min((unit + 1) * ROWS_PER_UNIT, num_rows)):
            offset = number * row_bytes
            widen(dtype, x + offset, row, width)
            if residual != 0:
                widen(dtype, residual + offset, other, width)
                for i in range(0, width, LANES):
                    store(row + 4 * i, add(load(row + 4 * i), load(other + 4 * i)))
                narrow(dtype, row, total + offset, width)
                widen(dtype, total + offset, row, width)
            scale_row(row, wide_weight, width, as_float(eps_bits))
            narrow(dtype, row, out + offset, width)
        unit = next_unit(control)
    end(control)


def _run(x: torch.Tensor, residual: int, weight: torch.Tensor, total: int, eps: float) -> torch.Tensor:
    out = empty(x.shape, x.dtype)
    num_rows, width = x.shape
    launch(
        norm_rows,
        -(-num_rows // ROWS_PER_UNIT),
        0.3 * num_rows * width,
        12 * (width + LANES),
        x.data_ptr(),
        residual,
        weight.data_ptr(),
        out.data_ptr(),
        total,
        DTYPES[x.dtype],
        DTYPES[weight.dtype],
        num_rows,
        width,
        float_bits(eps),
    )
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `aiexport_edge.kernels.rms_norm.rms_norm_reference`."""
    return _run(x.contiguous(), 0, weight.contiguous(), 0, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `aiexport_edge.kernels.rms_norm.add_rms_norm_reference`."""
    x, residual = x.contiguous(), residual.contiguous()
    assert x.dtype == residual.dtype
    total = empty(x.shape, x.dtype)
    return _run(x, residual.data_ptr(), weight.contiguous(), total.data_ptr(), eps), total
