"""Picking rows. A unit of work is a few of them."""

from __future__ import annotations

import torch

from aiexport_edge.kernels.cpu.jit import kernel
from aiexport_edge.kernels.cpu.memory import get_int32, get_int64, narrow, widen
from aiexport_edge.kernels.cpu.simd import LANES
from aiexport_edge.kernels.cpu.units import DTYPES, begin, end, next_unit
from aiexport_edge.kernels.cpu.words import set_int32
from aiexport_edge.kernels.threads import empty, is_recording, launch

ROWS_PER_UNIT = 16
WORD = 4  # bytes


@kernel
def copy_rows(
    control: int, scratch: int, num_units: int, source: int, rows: int, out: int, num_rows: int, num_words: int
) -> None:
    """Rows of 32-bit words, one after the other."""
    unit = begin(control)
    while unit < num_units:
        for number in range(unit * ROWS_PER_UNIT, min((unit + 1) * ROWS_PER_UNIT, num_rows)):
            row = source + get_int64(rows, number) * num_words * WORD
            for word in range(num_words):
                set_int32(out, number * num_words + word, get_int32(row, word))
        unit = next_unit(control)
    end(control)


@kernel
def copy_odd_rows(
    control: int, scratch: int, num_units: int, source: int, rows: int, out: int, dtype: int, width: int
) -> None:
    """Rows of an odd number of floats of 16 bits. A unit is a row."""
    unit = begin(control)
    while unit < num_units:
        widen(dtype, source + 2 * get_int64(rows, unit) * width, scratch, width)
        narrow(dtype, scratch, out + 2 * unit * width, width)
        unit = next_unit(control)
    end(control)


def _has_whole_words(hidden: torch.Tensor) -> bool:
    return hidden.shape[1] * hidden.element_size() % WORD == 0


def fits(hidden: torch.Tensor) -> bool:
    """Whether its rows are whole words, or floats."""
    return _has_whole_words(hidden) or hidden.dtype in (torch.bfloat16, torch.float16)


def check_rows(rows: torch.Tensor, num_rows: int) -> None:
    """Raises IndexError where one of `rows` (int64 [B]) is not in [0, `num_rows`): a kernel would read whatever lies
    there. Not while launches are recorded, when the numbers are not there yet.
    """
    assert rows.dtype == torch.int64
    if not is_recording() and rows.numel():
        lowest, highest = (int(row) for row in rows.aminmax())
        if lowest < 0 or highest >= num_rows:
            raise IndexError(f"rows {lowest} to {highest} of {num_rows}")


def gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See `aiexport_edge.kernels.gather.gather_rows_reference`, for rows that `fits` says yes to. Raises IndexError as
    `check_rows` does.
    """
    check_rows(rows, hidden.shape[0])
    hidden, rows = hidden.contiguous(), rows.contiguous()
    assert fits(hidden)
    num_rows, width = rows.shape[0], hidden.shape[1]
    out = empty((num_rows, width), hidden.dtype)
    if not _has_whole_words(hidden):
        launch(
            copy_odd_rows,
            num_rows,
            0.3 * num_rows * width,
            4 * (width + LANES),
            hidden.data_ptr(),
            rows.data_ptr(),
            out.data_ptr(),
            DTYPES[hidden.dtype],
            width,
        )
        return out
    num_words = width * hidden.element_size() // WORD
    launch(
        copy_rows,
        -(-num_rows // ROWS_PER_UNIT),
        0.3 * num_rows * num_words,
        0,
        hidden.data_ptr(),
        rows.data_ptr(),
        out.data_ptr(),
        num_rows,
        num_words,
    )
    return out
