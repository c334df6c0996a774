"""Low-rank adapters. A unit of work is one token; one without an adapter costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.memory import get_float32, get_int32, get_int64, load, narrow, set_float32, store, widen
from aiexport_edge.kernels.cpu.simd import LANES, fma, splat, sum_lanes
from aiexport_edge.kernels.cpu.units import DTYPES, begin, end, next_unit
from aiexport_edge.kernels.threads import launch

if TYPE_CHECKING:
    from aiexport_edge.kernels.lora import LoraTable

ROWS = 4  # of `a`, at a time; a table's ranks are padded to a multiple of it


@inner
def _dot_rows(x: int, a: int, out: int, rank: int, width: int) -> None:
    """out[r] = x · row r of a, for `rank` float32 rows `width` long; x is padded with zeros."""
    whole = width - width % LANES
    for row in range(0, rank, ROWS):
        first = a + 4 * row * width
        second, third, fourth = first + 4 * width, first + 8 * width, first + 12 * width
        zero = splat(np.float32(0.0))
        sum_0, sum_1, sum_2, sum_3 = zero, zero, zero, zero
        for i in range(0, whole, LANES):
            factor = load(x + 4 * i)
            sum_0 = fma(factor, load(first + 4 * i), sum_0)
            sum_1 = fma(factor, load(second + 4 * i), sum_1)
            sum_2 = fma(factor, load(third + 4 * i), sum_2)
            sum_3 = fma(factor, load(fourth + 4 * i), sum_3)
        rest_0, rest_1 = sum_lanes(sum_0), sum_lanes(sum_1)
        rest_2, rest_3 = sum_lanes(sum_2), sum_lanes(sum_3)
        for i in range(whole, width):
            number = get_float32(x, i)
            rest_0 += number * get_float32(first, i)
            rest_1 += number * get_float32(second, i)
            rest_2 += number * get_float32(third, i)
            rest_3 += number * get_float32(fourth, i)
        set_float32(out, row, rest_0)
        set_float32(out, row + 1, rest_1)
        set_float32(out, row + 2, rest_2)
        set_float32(out, row + 3, rest_3)


@inner
def _add_rows(factors: int, b: int, b_stride: int, out: int, rank: int, width: int) -> None:
    """out += the sum of `rank` float32 rows of b, `b_stride` bytes apart and `width` long, each times its factor."""
    whole = width - width % LANES
    for row in range(0, rank, ROWS):
        first = b + row * b_stride
        second, third, fourth = first + b_stride, first + 2 * b_stride, first + 3 * b_stride
        number_0, number_1 = get_float32(factors, row), get_float32(factors, row + 1)
        number_2, number_3 = get_float32(factors, row + 2), get_float32(factors, row + 3)
        factor_0, factor_1, factor_2, factor_3 = splat(number_0), splat(number_1), splat(number_2), splat(number_3)
        for i in range(0, whole, LANES):
            total = fma(factor_0, load(first + 4 * i), load(out + 4 * i))
            total = fma(factor_1, load(second + 4 * i), total)
            total = fma(factor_2, load(third + 4 * i), total)
            store(out + 4 * i, fma(factor_3, load(fourth + 4 * i), total))
        for i in range(whole, width):
            single = get_float32(out, i) + number_0 * get_float32(first, i) + number_1 * get_float32(second, i)
            single = single + number_2 * get_float32(third, i) + number_3 * get_float32(fourth, i)
            set_float32(out, i, single)


@kernel
def lora_rows(
    control: int,
    scratch: int,
    num_units: int,
    out: int,
    x: int,
    slots: int,
    ranks: int,
    a: int,
    b: int,
    ends: int,
    num_parts: int,
    max_rank: int,
    dtype: int,
    in_features: int,
    out_features: int,
) -> None:
    """One token after the other: its row of `out`, which is read and written."""
    item = 4 if dtype == 0 else 2
    padded_in = (in_features + LANES - 1) // LANES * LANES
    padded_out = (out_features + LANES - 1) // LANES * LANES
    row, total, hidden = scratch, scratch + 4 * padded_in, scratch + 4 * (padded_in + padded_out)
    token = begin(control)
    while token < num_units:
        slot = get_int32(slots, token)
        rank = 0
        if slot >= 0:
            rank = (get_int32(ranks, slot) + ROWS - 1) // ROWS * ROWS
        if rank > 0:
            widen(dtype, x + token * in_features * item, row, in_features)
            widen(dtype, out + token * out_features * item, total, out_features)
            start = 0
            for part in range(num_parts):
                stop = get_int64(ends, part)
                _dot_rows(row, a + 4 * (slot * num_parts + part) * max_rank * in_features, hidden, rank, in_features)
                rows = b + 4 * (slot * max_rank * out_features + start)
                _add_rows(hidden, rows, 4 * out_features, total + 4 * start, rank, stop - start)
                start = stop
            narrow(dtype, total, out + token * out_features * item, out_features)
        token = next_unit(control)
    end(control)


def add_lora(out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, table: LoraTable) -> None:
    """See `aiexport_edge.kernels.lora.add_lora_reference`. A sum's order depends on the rank alone."""
    _, num_parts, max_rank, in_features = table.a.shape
    num_tokens, out_features = out.shape
    assert out.is_contiguous()
    assert slots.dtype == torch.int32
    assert table.a.dtype == table.b.dtype == torch.float32
    x = x.contiguous()
    launch(
        lora_rows,
        num_tokens,
        0.05 * num_tokens * max_rank * (num_parts * in_features + out_features),
        4 * (in_features + out_features + 2 * LANES + max_rank),
        out.data_ptr(),
        x.data_ptr(),
        slots.data_ptr(),
        table.ranks.data_ptr(),
        table.a.data_ptr(),
        table.b.data_ptr(),
        table.host_ends.data_ptr(),
        num_parts,
        max_rank,
        DTYPES[out.dtype],
        in_features,
        out_features,
    )
