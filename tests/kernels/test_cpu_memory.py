"""Rows of 16-bit floats to and from float32: every value there is, and what lies where rounding turns.

A process of its own compiles the same code for a processor without instructions for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aiexport_edge.kernels.cpu.jit import kernel
from aiexport_edge.kernels.cpu.memory import narrow, widen
from aiexport_edge.kernels.cpu.units import DTYPES

OLD_PROCESSOR = {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse4.2"}


@kernel
def widen_row(dtype: int, source: int, target: int, count: int) -> None:
    widen(dtype, source, target, count)


@kernel
def narrow_row(dtype: int, source: int, target: int, count: int) -> None:
    narrow(dtype, source, target, count)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    out = torch.empty(1 << 16)
    widen_row(DTYPES[dtype], values.data_ptr(), out.data_ptr(), 1 << 16)
    expected = values.float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.view(torch.int32)[~expected.isnan()], expected.view(torch.int32)[~expected.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing(dtype: torch.dtype) -> None:
    wide = every_value(dtype).float()
    bits = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=torch.Generator().manual_seed(0))
    near = [wide * (1 + sign * 2.0**power) for sign in (-1, 1) for power in (-8, -9, -10, -11, -12, -20)]
    borders = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-14, 3.4e38])
    values = torch.cat([bits.to(torch.int32).view(torch.float32), wide, *near, borders, -borders])
    out = torch.empty(values.shape, dtype=dtype)
    narrow_row(DTYPES[dtype], values.data_ptr(), out.data_ptr(), values.numel())
    expected = values.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.view(torch.int16)[~expected.isnan()], expected.view(torch.int16)[~expected.isnan()])


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 33])
def test_nothing_is_touched_beyond_a_row(count: int, dtype: torch.dtype) -> None:
    source = torch.full((64,), float("nan"), dtype=dtype)
    source[:count] = torch.arange(count, dtype=dtype)
    wide = torch.full((64,), -1.0)
    widen_row(DTYPES[dtype], source.data_ptr(), wide.data_ptr(), count)
    padded = -(-count // 16) * 16
    assert wide.tolist() == [*map(float, range(count)), *[0.0] * (padded - count), *[-1.0] * (64 - padded)]
    back = torch.full((64,), -1.0, dtype=dtype)
    narrow_row(DTYPES[dtype], wide.data_ptr(), back.data_ptr(), count)
    assert back.tolist() == [*map(float, range(count)), *[-1.0] * (64 - count)]


@pytest.mark.skipif("NUMBA_CPU_NAME" in os.environ, reason="runs itself once more")
@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="an x86-64 processor")
def test_a_processor_without_these_instructions(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | OLD_PROCESSOR | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
