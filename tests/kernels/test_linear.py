"""Packed products: against the reference, and in deterministic mode each row by itself bit for bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, randn

from aiexport_edge.kernels import threads, tiling
from aiexport_edge.kernels.linear import PackedLinear, linear_reference, supports_bf16

SHAPES = [(64, 64), (192, 64), (512, 172), (1000, 300), (33, 2500), (1, 7), (3, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_against_the_reference(out_features: int, in_features: int, deterministic: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = randn(generator, out_features, in_features, dtype=dtype) * in_features**-0.5
    for bias in (None, randn(generator, out_features, dtype=dtype)):
        product = PackedLinear(weight, bias, dtype=dtype, deterministic=deterministic)
        for num_rows in (0, 1, 3, 150):
            x = randn(generator, num_rows, in_features, dtype=dtype)
            out = product(x)
            assert out.shape == (num_rows, out_features)
            assert out.dtype == dtype
            assert_close(out, linear_reference(x, weight, bias), dtype)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (512, 172), (96, 2048), (40, 3072), (2048, 151)])
def test_a_row_is_the_same_in_every_batch(
    out_features: int, in_features: int, dtype: torch.dtype, num_threads: int
) -> None:
    before = threads.num_threads()
    generator = torch.Generator().manual_seed(1)
    weight, bias = randn(generator, out_features, in_features), randn(generator, out_features)
    x = randn(generator, 600, in_features, dtype=dtype)
    try:
        threads.set_num_threads(num_threads)
        product = PackedLinear(weight, bias, dtype=dtype, deterministic=True)
        whole = product(x)
        for num_rows in [*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 599]:
            rows = torch.randperm(600, generator=generator)[:num_rows]
            assert torch.equal(product(x[rows]), whole[rows])
        threads.set_num_threads(3 - num_threads)
        assert torch.equal(product(x), whole)
    finally:
        threads.set_num_threads(before)


def test_rows_need_not_be_contiguous() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, x = randn(generator, 24, 16), randn(generator, 9, 32)[:, ::2]
    for deterministic in (True, False):
        product = PackedLinear(weight, dtype=torch.float32, deterministic=deterministic)
        assert_close(product(x), linear_reference(x, weight), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_is_not_kept(dtype: torch.dtype) -> None:
    weight = torch.ones(64, 64, dtype=dtype)
    alive = weakref.ref(weight)
    product = PackedLinear(weight, dtype=dtype, deterministic=True)
    del weight
    gc.collect()
    assert alive() is None
    assert product(torch.ones(1, 64, dtype=dtype))[0, 0] == 64


def test_trial_finds_what_depends_on_the_number_of_rows() -> None:
    """A library that adds in another order above 32 rows, and in yet another for a single one."""
    weight, rows = tiling.trial_operands(48, 200, torch.float32, torch.device("cpu"))

    def product(x: torch.Tensor) -> torch.Tensor:
        pieces = 4 if x.shape[0] > 32 else 2 if x.shape[0] > 1 else 1
        columns = torch.arange(200).chunk(pieces)
        return sum((x[:, piece, None].mul(weight.t()[None, piece]).sum(1) for piece in columns), torch.zeros(()))

    agreeing = [sizes for sizes in tiling.TILINGS if tiling.agree(product, rows, sizes)]
    assert agreeing[0] == (2, 4, 8, 16, 32)
    assert (1,) in agreeing


def test_trial_finds_what_depends_on_the_place_of_a_row() -> None:
    weight, rows = tiling.trial_operands(48, 200, torch.float32, torch.device("cpu"))

    def product(x: torch.Tensor) -> torch.Tensor:
        out = x @ weight.t()
        out[5:6] += 1e-3
        return out

    assert not any(tiling.agree(product, rows, sizes) for sizes in tiling.TILINGS if sizes[-1] > 5)


def test_support_of_bf16_is_known() -> None:
    assert supports_bf16() in (True, False)
