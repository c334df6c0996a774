"""Norms, SwiGLU and row gathering on the CPU: against their references, and each row by itself."""

from __future__ import annotations

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, poisoned, randn

from aiexport_edge.kernels.gather import add_to_rows, gather_rows, gather_rows_reference
from aiexport_edge.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from aiexport_edge.kernels.swiglu import swiglu, swiglu_reference

SHAPES = [(1, 1), (1, 1024), (3, 8), (9, 15), (5, 17), (17, 172), (2, 4096), (33, 96)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = randn(generator, *shape, dtype=dtype), randn(generator, shape[1], dtype=dtype)
    before = x.clone()
    with poisoned():
        out = rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    assert_close(out, rms_norm_reference(x, weight, 1e-5), dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, residual = randn(generator, *shape, dtype=dtype), randn(generator, *shape, dtype=dtype)
    weight = randn(generator, shape[1])  # of another dtype than x
    before = x.clone(), residual.clone()
    with poisoned():
        normed, total = add_rms_norm(x, residual, weight, 1e-6)
    expected_normed, expected_total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert_close(normed, expected_normed, dtype)
    assert torch.equal(total, expected_total)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_norm_of_tiny_and_huge_rows() -> None:
    x = torch.tensor([[0.0] * 20, [1e-20] * 20, [1e18] * 20])
    weight = torch.ones(20)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    gate_up = 6 * randn(generator, shape[0], 2 * shape[1], dtype=dtype)
    before = gate_up.clone()
    with poisoned():
        out = swiglu(gate_up)
    assert_close(out, swiglu_reference(gate_up), dtype)
    assert torch.equal(gate_up, before)


def test_swiglu_of_extreme_gates() -> None:
    gate = torch.tensor([[-3e38, -200.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 200.0, 1e30]])
    out = swiglu(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(
        out, swiglu_reference(torch.cat((gate, torch.ones_like(gate)), dim=1)), rtol=1e-6, atol=1e-36
    )


def test_inputs_need_not_be_contiguous() -> None:
    generator = torch.Generator().manual_seed(3)
    wide = randn(generator, 6, 80)
    x, weight = wide[:, ::2], randn(generator, 40)
    assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), torch.float32)
    assert_close(swiglu(x), swiglu_reference(x), torch.float32)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [40, 172])
def test_a_row_is_the_same_in_every_batch(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x, residual = randn(generator, 600, width, dtype=dtype), randn(generator, 600, width, dtype=dtype)
    weight = randn(generator, width, dtype=dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    activated = swiglu(x)
    for num_rows in (1, 2, 3, 7, 8, 9, 31, 64, 255, 599):
        rows = torch.randperm(600, generator=generator)[:num_rows]
        again, total_again = add_rms_norm(x[rows], residual[rows], weight, 1e-6)
        assert torch.equal(again, normed[rows])
        assert torch.equal(total_again, total[rows])
        assert torch.equal(rms_norm(total[rows], weight, 1e-6), normed[rows])
        assert torch.equal(swiglu(x[rows]), activated[rows])


def test_no_rows() -> None:
    x, weight = torch.empty(0, 32), torch.ones(32)
    assert rms_norm(x, weight, 1e-6).shape == (0, 32)
    assert [tensor.shape for tensor in add_rms_norm(x, x, weight, 1e-6)] == [(0, 32), (0, 32)]
    assert swiglu(x).shape == (0, 16)


def test_gather_rows() -> None:
    hidden, rows = torch.arange(12.0).view(4, 3), torch.tensor([3, 0, 3])
    assert torch.equal(gather_rows(hidden, rows), gather_rows_reference(hidden, rows))
    assert gather_rows(hidden, rows)[:, 0].tolist() == [9.0, 0.0, 9.0]


def test_add_to_rows() -> None:
    hidden, rows, values = torch.zeros(4, 3), torch.tensor([3, 0]), torch.arange(6.0).view(2, 3)
    add_to_rows(hidden, rows, values)
    assert hidden.tolist() == [[3.0, 4.0, 5.0], [0.0] * 3, [0.0] * 3, [0.0, 1.0, 2.0]]
