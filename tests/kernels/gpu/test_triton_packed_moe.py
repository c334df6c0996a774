"""Experts of four and eight bits in the interpreter, against the reference on the decoded weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.kernel_cases import assert_close, poisoned, randn

from aiexport_edge.kernels import moe
from aiexport_edge.kernels.gpu.launch import KNOWN, Architecture
from aiexport_edge.kernels.gpu.moe import FEW_TOKENS
from aiexport_edge.kernels.gpu.packed_moe import packed_moe, settings, stack_experts
from aiexport_edge.kernels.linear import round_for_card
from aiexport_edge.kernels.moe import Experts, moe_mlp_reference, route_reference
from aiexport_edge.kernels.quantization import (
    Fp8Weight,
    Int4Weight,
    QuantizedWeight,
    dequantized,
    int8_weight,
    quantize_fp8,
    quantize_int4,
)

SMALL = Architecture(86, 4)
KINDS = ("int4-32", "int4-128", "int8", "fp8", "fp8-block")


def quantized(kind: str, weight: torch.Tensor) -> QuantizedWeight:
    if kind.startswith("int4"):
        return quantize_int4(weight, int(kind.removeprefix("int4-")))
    if kind == "int8":
        return int8_weight(weight)
    rounded = quantize_fp8(weight)
    if kind == "fp8":
        return rounded
    scales = torch.rand(-(-weight.shape[0] // 16), -(-weight.shape[1] // 64)) + 0.5
    return Fp8Weight(rounded.codes, scales / (448 * weight.shape[1] ** 0.5), (16, 64))


def make(kind: str, num_experts: int, hidden: int, size: int, seed: int) -> tuple[list[QuantizedWeight], ...]:
    generator = torch.Generator().manual_seed(seed)
    gate_up = [quantized(kind, randn(generator, 2 * size, hidden) / hidden**0.5) for _ in range(num_experts)]
    return gate_up, [quantized(kind, randn(generator, hidden, size) / size**0.5) for _ in range(num_experts)]


def check(
    kind: str,
    num_tokens: int,
    *,
    hidden: int = 160,
    size: int = 80,
    num_experts: int = 4,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    has_order: bool = False,
    only: int | None = None,
    architecture: Architecture = SMALL,
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    gate_up, down = make(kind, num_experts, hidden, size, num_tokens + hidden)
    if has_order:
        assert isinstance(down[1], Int4Weight)
        assert isinstance(gate_up[0], Int4Weight)
        down[1] = replace(down[1], order=torch.randperm(size, generator=generator))
        gate_up[0] = replace(gate_up[0], order=torch.randperm(hidden, generator=generator))
    x = randn(generator, num_tokens, hidden, dtype=dtype)
    weights, experts = route_reference(3 * randn(generator, num_tokens, num_experts), top_k, normalize=True)
    if only is not None:
        experts = experts.fill_(only)
    packed = stack_experts(gate_up, down)
    assert packed is not None
    with poisoned():
        actual = packed_moe(x, weights, experts, packed, architecture=architecture)
    wide = [torch.stack([weight.dequantize() for weight in of]) for of in (gate_up, down)]
    assert_close(actual, moe_mlp_reference(x, weights, experts, wide[0], wide[1]), dtype)


@pytest.mark.parametrize("num_tokens", [1, FEW_TOKENS + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, num_tokens: int) -> None:
    check(kind, num_tokens)


@pytest.mark.parametrize("kind", ["int4-32", "fp8"])
@pytest.mark.parametrize(("hidden", "size"), [(33, 17), (150, 70)])
def test_odd_widths_in_float16(hidden: int, size: int, kind: str) -> None:
    for num_tokens in (2, 12):
        check(kind, num_tokens, hidden=hidden, size=size, dtype=torch.float16)


@pytest.mark.parametrize("num_tokens", [3, 12])
def test_inputs_in_an_order_of_each_experts_own(num_tokens: int) -> None:
    check("int4-32", num_tokens, has_order=True)


@pytest.mark.parametrize("kind", ["int4-128", "fp8-block"])
def test_all_tokens_take_one_expert(kind: str) -> None:
    check(kind, 70, top_k=1, only=3)


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: str(architecture.capability))
def test_every_architectures_blocks(architecture: Architecture) -> None:
    check("int4-32", 130, num_experts=2, top_k=2, hidden=64, size=48, architecture=architecture)


def test_batch_invariant_bits() -> None:
    """A token alone, among few and among many."""
    generator = torch.Generator().manual_seed(9)
    packed = stack_experts(*make("int4-32", 4, 96, 48, 1))
    assert packed is not None
    x = randn(generator, 60, 96, dtype=torch.bfloat16)
    weights, experts = route_reference(randn(generator, 60, 4), 2, normalize=True)

    def run(rows: slice) -> torch.Tensor:
        return packed_moe(x[rows], weights[rows], experts[rows], packed, batch_invariant=True, architecture=SMALL)

    everything = run(slice(0, 60))
    for rows in (slice(7, 8), slice(30, 36), slice(3, 25)):
        assert torch.equal(run(rows), everything[rows])


def test_settings_depend_on_how_many_slots_an_expert_has() -> None:
    def slots(num_slots: int, *, batch_invariant: bool = False) -> int:
        return settings(
            KNOWN[3], num_slots=num_slots, num_experts=128, is_gated=True, batch_invariant=batch_invariant
        ).block_slots

    assert [slots(number) for number in (0, 72, 4096, 100_000)] == [16, 16, 32, 64]
    assert slots(100_000, batch_invariant=True) == 16


def test_experts_of_several_forms_are_not_stacked() -> None:
    gate_up, down = make("int4-32", 2, 64, 32, 1)
    assert stack_experts([gate_up[0], *make("int8", 1, 64, 32, 1)[0]], down) is None
    assert stack_experts(gate_up, [quantize_int4(torch.zeros(64, 96), 48)] * 2) is None


@pytest.mark.parametrize(
    ("kind", "quantize", "is_decoded"),
    [("", "int4", False), ("", "fp8", False), ("int4-32", "none", False), ("int4-48", "none", True)],
)
def test_a_layers_experts(kind: str, quantize: str, is_decoded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are stored, rounded when they are loaded, or decoded where the kernels do not take them."""
    monkeypatch.setattr(moe, "_is_on_card", lambda weight: True)
    generator = torch.Generator().manual_seed(4)
    wide = [randn(generator, 4, 2 * 48, 96) / 9, randn(generator, 4, 96, 48) / 7]
    parts = [[quantized(kind, weight) if kind else weight for weight in of] for of in wide]
    layer = Experts(
        (([gate_up], down) for gate_up, down in zip(*parts, strict=True)),
        dtype=torch.bfloat16,
        deterministic=False,
        quantize=quantize,
    )
    assert layer.is_decoded is is_decoded
    x = randn(generator, 3, 96, dtype=torch.bfloat16)
    weights, experts = route_reference(randn(generator, 3, 4), 2, normalize=True)
    if quantize != "none":
        decoded = [torch.stack([round_for_card(each, quantize).dequantize() for each in of]) for of in wide]
    else:
        decoded = [torch.stack([dequantized(each, torch.float32) for each in of]) for of in parts]
    if not is_decoded:
        assert_close(layer(x, weights, experts), moe_mlp_reference(x, weights, experts, *decoded), torch.bfloat16)
