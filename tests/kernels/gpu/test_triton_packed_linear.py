"""Products with weights of four and eight bits in the interpreter, against the reference on the decoded weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.kernel_cases import assert_close, poisoned, randn

from aiexport_edge.kernels.gpu import fp8_linear, quantized_product
from aiexport_edge.kernels.gpu.launch import H200, KNOWN, Architecture
from aiexport_edge.kernels.gpu.packed_linear import decode_weight, pack, packed_linear, settings, takes
from aiexport_edge.kernels.gpu.quantized_product import MOST_ROWS, CardProduct
from aiexport_edge.kernels.packed_linear import (
    fp8_linear_reference,
    packed_linear_reference,
    quantize_rows_reference,
)
from aiexport_edge.kernels.quantization import (
    Fp8Weight,
    Int4Weight,
    QuantizedWeight,
    int8_weight,
    quantize_fp8,
    quantize_int4,
)

SMALL = Architecture(86, 4)
KINDS = ("int4-16", "int4-32", "int4-128", "int8", "fp8", "fp8-block")


def quantized(kind: str, weight: torch.Tensor) -> QuantizedWeight:
    if kind.startswith("int4"):
        return quantize_int4(weight, int(kind.removeprefix("int4-")))
    if kind == "int8":
        return int8_weight(weight)
    rounded = quantize_fp8(weight)
    if kind == "fp8":
        return rounded
    num_outputs, width = weight.shape
    scales = torch.rand(-(-num_outputs // 64), -(-width // 128)) + 0.5
    return Fp8Weight(rounded.codes, scales * 1e-3, (64, 128))


def check(
    kind: str,
    num_tokens: int,
    num_outputs: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    architecture: Architecture = SMALL,
    batch_invariant: bool = False,
    has_bias: bool = False,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_outputs)
    weight = quantized(kind, randn(generator, num_outputs, width) / width**0.5)
    x = randn(generator, num_tokens + 1, width, dtype=dtype)[:num_tokens]
    bias = randn(generator, num_outputs, dtype=dtype) if has_bias else None
    assert takes(weight)
    with poisoned():
        actual = packed_linear(
            x, pack(weight), bias, out_dtype=dtype, architecture=architecture, batch_invariant=batch_invariant
        )
    assert_close(actual, packed_linear_reference(x, weight, bias), dtype)
    return actual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, dtype: torch.dtype) -> None:
    check(kind, 3, 70, 256, dtype)


@pytest.mark.parametrize(("num_outputs", "width"), [(1, 1), (33, 130), (128, 300), (65, 1000)])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_shapes_with_bias(kind: str, num_outputs: int, width: int) -> None:
    check(kind, 2, num_outputs, width, has_bias=True)


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 33, 70])
def test_rows(num_tokens: int) -> None:
    check("int4-32", num_tokens, 70, 256, architecture=KNOWN[num_tokens % len(KNOWN)])


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: str(architecture.capability))
def test_parts_of_the_inputs(architecture: Architecture) -> None:
    check("int4-128", 1, 64, 2500, architecture=architecture, has_bias=True)


@pytest.mark.parametrize("kind", ["int4-32", "fp8"])
def test_a_rows_bits_do_not_depend_on_others(kind: str) -> None:
    whole = check(kind, 40, 65, 1100, batch_invariant=True)
    for num_tokens in (1, 17):
        assert torch.equal(check(kind, num_tokens, 65, 1100, batch_invariant=True), whole[:num_tokens])


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_weights(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = quantized(kind, randn(generator, 70, 200))
    with poisoned():
        assert_close(decode_weight(pack(weight), torch.float16), weight.dequantize(), torch.float16)


def test_few_outputs_are_shared_out_by_inputs() -> None:
    assert settings(1, 4096, 32, H200, batch_invariant=False).splits == 5
    assert settings(1, 24576, 32, H200, batch_invariant=False).splits == 1
    assert settings(1, 64, 1, H200, batch_invariant=False).splits == 1


@pytest.mark.parametrize("num_rows", [1, 70])
@pytest.mark.parametrize(("num_outputs", "width"), [(33, 130), (130, 256)])
@pytest.mark.parametrize("kind", ["fp8", "fp8-block"])
def test_fp8_rows(kind: str, num_outputs: int, width: int, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = quantized(kind, randn(generator, num_outputs, width) / width**0.5)
    assert isinstance(weight, Fp8Weight)
    x = randn(generator, num_rows, width, dtype=torch.bfloat16)
    x[0] = 0.0
    bias = randn(generator, num_outputs, dtype=torch.bfloat16)
    own = pack(weight)
    assert fp8_linear.takes(own)
    group = fp8_linear.group_of(own)
    expected_codes, expected_scales = quantize_rows_reference(x, group)
    with poisoned():
        codes, scales = fp8_linear.quantize_rows(x, group)
        assert torch.equal(codes, expected_codes.view(torch.uint8))
        torch.testing.assert_close(scales, expected_scales)
        actual = fp8_linear.fp8_linear(codes, scales, own, bias, out_dtype=torch.bfloat16)
    expected = fp8_linear_reference(expected_codes, expected_scales, group, weight, bias, torch.bfloat16)
    assert_close(actual, expected, torch.bfloat16)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["int4-32", "int8", "fp8", "fp8-block"])
def test_any_number_of_rows(kind: str, deterministic: bool) -> None:
    """Whichever kernel multiplies; FP8 rows are rounded where there are many."""
    generator = torch.Generator().manual_seed(5)
    weight = quantized(kind, randn(generator, 70, 256) / 16)
    if isinstance(weight, Int4Weight):
        weight = replace(weight, order=torch.randperm(256, generator=generator))
    bias = randn(generator, 70)
    assert quantized_product.fits(weight, torch.bfloat16)
    product = CardProduct(
        weight, bias, dtype=torch.bfloat16, deterministic=deterministic, architecture=Architecture(90, 4)
    )
    x = randn(generator, MOST_ROWS + 6, 256, dtype=torch.bfloat16)
    expected = packed_linear_reference(x.float(), weight, bias)
    for num_rows in (1, MOST_ROWS + 6):
        actual = product.multiply(x[:num_rows], torch.float32)
        tolerance = 0.03 if kind.startswith("fp8") and num_rows > MOST_ROWS and not deterministic else 0.005
        assert (actual - expected[:num_rows]).norm() <= tolerance * expected[:num_rows].norm()


def test_what_no_kernel_takes() -> None:
    weight = quantize_int4(torch.zeros(8, 96), 48)
    assert not quantized_product.fits(weight, torch.bfloat16)
    assert not quantized_product.fits(quantize_int4(torch.zeros(8, 96)), torch.float32)
