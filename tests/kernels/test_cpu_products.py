"""Our own packed products: against the reference, in bfloat16 and int8; and the rows that a tied embedding gathers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.kernel_cases import assert_close, randn

from aiexport_edge.kernels import linear, threads
from aiexport_edge.kernels.cpu import dot
from aiexport_edge.kernels.linear import PackedLinear, linear_reference
from aiexport_edge.kernels.quantization import quantize_fp8, quantize_int4, quantize_int8

SHAPES = [(64, 64), (192, 64), (512, 172), (1000, 300), (33, 2500), (1, 7), (3, 1)]
ROWS = (0, 1, 2, 5, 12, 13, 25, 40)


@pytest.fixture(params=["own", "torch"])
def int8_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to multiply with int8 weights, where this processor has it."""
    if request.param == "own" and not dot.HAS_INT8:
        pytest.skip("this processor does not multiply int8 quadruples")
    if request.param == "torch":
        monkeypatch.setattr(linear, "_pack_own", lambda *arguments, **options: None)
    return str(request.param)


@pytest.mark.skipif(not dot.HAS_BFLOAT16, reason="this processor does not multiply bfloat16 pairs")
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_weights_of_several_parts_are_one(out_features: int, in_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [randn(generator, rows, in_features, dtype=torch.bfloat16) for rows in (32, out_features, 5)]
    x = randn(generator, 3, in_features, dtype=torch.bfloat16)
    product = PackedLinear(parts, dtype=torch.bfloat16, deterministic=False)
    assert product.is_own
    assert_close(product(x), linear_reference(x, torch.cat(parts)), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_int8_weights_against_their_float_values(
    out_features: int, in_features: int, dtype: torch.dtype, int8_products: str
) -> None:
    """What is rounded besides the weights, the rows where they are quantized too, stays below a hundredth."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = randn(generator, out_features, in_features), randn(generator, out_features)
    values, scales = quantize_int8(weight)
    rounded = values * scales[:, None]
    product = PackedLinear(weight, bias, dtype=dtype, deterministic=True, quantize="int8")
    assert product.is_own == (int8_products == "own")
    x = randn(generator, max(ROWS), in_features, dtype=dtype)
    whole = product(x, out_dtype=torch.float32)
    expected = linear_reference(x.float(), rounded, bias)
    assert (whole - expected).norm() <= 0.01 * expected.norm()
    for num_rows in ROWS:
        out = product(x[:num_rows])
        assert out.dtype == dtype
        assert out.shape == (num_rows, out_features)
        assert torch.equal(product(x[:num_rows], out_dtype=torch.float32), whole[:num_rows])


@pytest.mark.usefixtures("int8_products")
def test_a_large_input_does_not_drown_the_others() -> None:
    """Rows are quantized in groups: one outlier costs its own group its precision, not the whole row."""
    generator = torch.Generator().manual_seed(2)
    weight, x = randn(generator, 64, 1024), randn(generator, 4, 1024)
    x[:, 7] = 1000.0
    weight[:, 7] = 0.0
    product = PackedLinear(weight, dtype=torch.float32, deterministic=True, quantize="int8")
    expected = linear_reference(x, weight)
    assert (product(x) - expected).norm() <= 0.4 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("int8_products")
def test_int8_rows_are_gathered_as_they_are_multiplied_with(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = randn(generator, 100, 70)
    values, scales = quantize_int8(weight)
    product = PackedLinear(weight, dtype=dtype, deterministic=True, quantize="int8")
    ids = torch.tensor([99, 0, 31, 32, 64, 99])
    assert product.gathers
    assert_close(product.gather(ids), (values[ids] * scales[ids, None]).to(dtype), dtype)


@pytest.mark.skipif(not dot.HAS_BFLOAT16, reason="this processor does not multiply bfloat16 pairs")
def test_bfloat16_rows_are_gathered_unchanged() -> None:
    generator = torch.Generator().manual_seed(4)
    for width in (70, 71):
        weight = randn(generator, 100, width, dtype=torch.bfloat16)
        product = PackedLinear(weight, dtype=torch.bfloat16, deterministic=True)
        ids = torch.tensor([99, 0, 31, 32, 64, 99])
        assert torch.equal(product.gather(ids), weight[ids])


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("wrong", [-1, 100, 1 << 40])
def test_a_row_that_is_not_there_is_an_error_and_not_whatever_lies_there(wrong: int, quantize: str) -> None:
    generator = torch.Generator().manual_seed(4)
    product = PackedLinear(randn(generator, 100, 70), dtype=torch.bfloat16, deterministic=True, quantize=quantize)
    if not product.gathers:
        pytest.skip("this processor's products are a library's, which keeps the embedding")
    with pytest.raises(IndexError):
        product.gather(torch.tensor([3, wrong, 99]))


def test_quantization_is_within_half_a_step() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = randn(generator, 50, 333)
    weight[7] = 0.0
    values, scales = quantize_int8(weight)
    assert values.dtype == torch.int8
    assert values.abs().max() == 127
    assert ((values * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()
    assert not values[7].any()


@pytest.mark.usefixtures("three_threads")
@pytest.mark.skipif(not dot.HAS_BFLOAT16, reason="this processor does not multiply bfloat16 pairs")
def test_threads_change_no_bit() -> None:
    generator = torch.Generator().manual_seed(6)
    weight = randn(generator, 333, 200)
    x = randn(generator, 30, 200, dtype=torch.bfloat16)
    for quantize in ("none", "int8", "int4"):
        several = PackedLinear(weight, dtype=torch.bfloat16, deterministic=True, quantize=quantize)(x)
        threads.set_num_threads(1)
        one = PackedLinear(weight, dtype=torch.bfloat16, deterministic=True, quantize=quantize)(x)
        threads.set_num_threads(3)
        assert torch.equal(one, several)


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_int4_weights_against_their_float_values(out_features: int, in_features: int, group: int) -> None:
    """Rows are rounded to int8 per group; that alone is between the two."""
    generator = torch.Generator().manual_seed(7)
    weight, bias = randn(generator, out_features, in_features), randn(generator, out_features)
    rounded = quantize_int4(weight, group)
    if out_features == 1000:  # codes in an order of their own, as GPTQ leaves them
        rounded = replace(rounded, order=torch.randperm(in_features, generator=generator))
    product = PackedLinear(rounded, bias, dtype=torch.float32, deterministic=True)
    assert product.is_own == dot.HAS_INT8
    x = randn(generator, max(ROWS), in_features)
    whole = product(x)
    expected = linear_reference(x, rounded.dequantize(), bias)
    assert (whole - expected).norm() <= 0.01 * expected.norm()
    for num_rows in ROWS:
        assert torch.equal(product(x[:num_rows]), whole[:num_rows])


def test_int4_of_several_parts_is_one() -> None:
    generator = torch.Generator().manual_seed(8)
    parts = [quantize_int4(randn(generator, rows, 96)) for rows in (32, 40, 5)]
    x = randn(generator, 3, 96)
    product = PackedLinear(parts, dtype=torch.float32, deterministic=True)
    expected = linear_reference(x, torch.cat([part.dequantize() for part in parts]))
    assert (product(x) - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("quantize", ["int4", "fp8"])
def test_rounding_to_few_bits(quantize: str) -> None:
    """What `quantize` asks for is what its function in `quantization` gives."""
    generator = torch.Generator().manual_seed(9)
    weight, x = randn(generator, 100, 70), randn(generator, 4, 70)
    rounded = quantize_int4(weight) if quantize == "int4" else quantize_fp8(weight)
    product = PackedLinear(weight, dtype=torch.float32, deterministic=True, quantize=quantize)
    expected = linear_reference(x, rounded.dequantize())
    assert (product(x) - expected).norm() <= 0.01 * expected.norm()
    error = (rounded.dequantize() - weight).norm() / weight.norm()
    assert error <= {"int4": 0.09, "fp8": 0.03}[quantize]
    row = torch.zeros(1, 70)
    assert not (quantize_int4(row) if quantize == "int4" else quantize_fp8(row)).dequantize().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 32), (3, 70), (40, 1000)])
def test_a_processor_rounds_to_four_bits_as_its_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Of two ranges with nearly the same error, which follows from the order of a sum, either may be chosen."""
    from aiexport_edge.kernels.cpu.int4_products import round_weight

    weight = randn(torch.Generator().manual_seed(10), *shape, dtype=dtype)
    weight[0] = 0.0
    actual, expected = round_weight(weight, 32), quantize_int4(weight, 32)
    assert (actual.codes == expected.codes).float().mean() > 0.99
    assert actual.scales.shape == expected.scales.shape
    wide = weight.float()
    assert (actual.dequantize() - wide).norm() <= 1.001 * (expected.dequantize() - wide).norm()
