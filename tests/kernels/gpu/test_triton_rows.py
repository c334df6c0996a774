"""Norms, SwiGLU and row gathering in the interpreter, each against its reference."""

from __future__ import annotations

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, poisoned, randn

from aiexport_edge.kernels.gather import gather_rows_reference
from aiexport_edge.kernels.gpu import gather, rms_norm, swiglu
from aiexport_edge.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from aiexport_edge.kernels.rms_norm_quantized import add_rms_norm_quantized_reference
from aiexport_edge.kernels.swiglu import swiglu_reference

SHAPES = ((1, 64), (3, 80), (2, 1000), (2, 2560), (1, 5120))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = randn(generator, *shape, dtype=dtype), randn(generator, shape[1], dtype=dtype)
    with poisoned():
        assert_close(rms_norm.rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, residual = randn(generator, *shape, dtype=dtype), randn(generator, shape[0], 2 * shape[1], dtype=dtype)
    residual = residual[:, : shape[1]]  # rows that do not follow each other
    weight = randn(generator, shape[1], dtype=dtype)
    with poisoned():
        normed, total = rms_norm.add_rms_norm(x, residual, weight, 1e-5)
    expected_normed, expected_total = add_rms_norm_reference(x, residual, weight, 1e-5)
    assert_close(normed, expected_normed, dtype)
    torch.testing.assert_close(total, expected_total, rtol=0, atol=0)


@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 1000)], ids=str)
def test_add_rms_norm_quantized(shape: tuple[int, int], dtype: torch.dtype, code: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x, residual = randn(generator, *shape, dtype=dtype), randn(generator, *shape, dtype=dtype)
    x[-1], residual[-1] = 0, 0  # a row of zeros has a scale, too
    weight = randn(generator, shape[1], dtype=dtype)
    with poisoned():
        codes, scales, total = rms_norm.add_rms_norm_quantized(x, residual, weight, 1e-5, code)
    expected_codes, expected_scales, expected_total = add_rms_norm_quantized_reference(x, residual, weight, 1e-5, code)
    assert codes.dtype == code
    torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)
    torch.testing.assert_close(total, expected_total, rtol=0, atol=0)
    # A last bit of the norm may round to the next code, and only there.
    exact = expected_codes.float() == codes.float()
    assert exact.float().mean() > 0.999
    step = 1 / 8 if code == torch.float8_e4m3fn else 1 / 127
    torch.testing.assert_close(codes.float(), expected_codes.float(), rtol=step, atol=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 200), (2, 2 * 1025), (0, 64)], ids=str)
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = 4 * randn(torch.Generator().manual_seed(3), *shape, dtype=dtype)
    with poisoned():
        assert_close(swiglu.swiglu(gate_up), swiglu_reference(gate_up), dtype)


def test_swiglu_of_large_gates() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -88.8, 0.0, 3.0, 2.0, 1.0, 1.0]])
    with poisoned():
        assert_close(swiglu.swiglu(gate_up), swiglu_reference(gate_up), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_rows(dtype: torch.dtype) -> None:
    hidden = randn(torch.Generator().manual_seed(4), 5, 2000, dtype=dtype)[:, :1100]
    rows = torch.tensor([4, 0, 0, 3])
    with poisoned():
        torch.testing.assert_close(
            gather.gather_rows(hidden, rows), gather_rows_reference(hidden, rows), rtol=0, atol=0
        )
