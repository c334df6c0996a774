"""Routing and experts in the interpreter against their references."""

from __future__ import annotations

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, poisoned, randn

from aiexport_edge.kernels.gpu.launch import KNOWN, Architecture
from aiexport_edge.kernels.gpu.moe import FEW_TOKENS, moe_mlp, route, settings
from aiexport_edge.kernels.moe import moe_mlp_reference, route_reference

SMALL = Architecture(86, 4)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (8, 2), (60, 4), (128, 8), (7, 7)])
def test_route(num_experts: int, top_k: int, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(num_experts)
    logits = 3 * randn(generator, 9, num_experts)
    logits[3] = 1.0  # all alike: the lowest go first
    logits[4, ::2] = logits[4, 1::2].amax() + 1
    expected_weights, expected = route_reference(logits, top_k, normalize=normalize)
    with poisoned():
        weights, experts = route(logits, top_k, normalize=normalize)
    assert torch.equal(experts, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)
    assert experts[3].tolist() == list(range(top_k))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 4), (128, 8)])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_choose_experts_that_there_are(num_experts: int, top_k: int, broken: float) -> None:
    """An index past the last expert would read, and count in, other memory."""
    logits = randn(torch.Generator().manual_seed(1), 3, num_experts)
    expected = route_reference(logits, top_k, normalize=True)
    logits[1] = broken
    weights, experts = route(logits, top_k, normalize=True)
    assert 0 <= int(experts.min()) <= int(experts.max()) < num_experts
    for row in (0, 2):
        assert torch.equal(experts[row], expected[1][row])
        torch.testing.assert_close(weights[row], expected[0][row], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_a_token_of_nans_stays_alone(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(8)
    x = randn(generator, num_tokens, 48)
    gate_up, down = randn(generator, 8, 80, 48) / 7, randn(generator, 8, 48, 40) / 7
    logits = randn(generator, num_tokens, 8)
    x[2], logits[2] = float("nan"), float("nan")
    weights, experts = route(logits, 2, normalize=True)
    actual = moe_mlp(x, weights, experts, gate_up, down, architecture=SMALL)
    others = torch.arange(num_tokens) != 2
    expected = moe_mlp_reference(x[others], weights[others], experts[others], gate_up, down)
    assert bool(actual[2].isnan().all())
    assert_close(actual[others], expected, torch.float32)


def check(
    num_tokens: int,
    *,
    hidden: int = 48,
    size: int = 40,
    num_experts: int = 8,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    only: int | None = None,
    architecture: Architecture = SMALL,
) -> None:
    generator = torch.Generator().manual_seed(num_tokens + hidden)
    x = randn(generator, num_tokens, hidden, dtype=dtype)
    gate_up = (randn(generator, num_experts, 2 * size, hidden) / hidden**0.5).to(dtype)
    down = (randn(generator, num_experts, hidden, size) / size**0.5).to(dtype)
    weights, experts = route_reference(3 * randn(generator, num_tokens, num_experts), top_k, normalize=True)
    if only is not None:
        experts = experts.fill_(only)
    with poisoned():
        actual = moe_mlp(x, weights, experts, gate_up, down, architecture=architecture)
    assert_close(actual, moe_mlp_reference(x, weights, experts, gate_up, down), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, FEW_TOKENS, FEW_TOKENS + 1, 70])
def test_tokens(num_tokens: int, dtype: torch.dtype) -> None:
    check(num_tokens, dtype=dtype)


@pytest.mark.parametrize(("hidden", "size"), [(64, 96), (33, 17), (300, 130)])
@pytest.mark.parametrize("num_tokens", [3, 20])
def test_odd_widths(num_tokens: int, hidden: int, size: int) -> None:
    check(num_tokens, hidden=hidden, size=size)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 3), (128, 8)])
@pytest.mark.parametrize("num_tokens", [2, 33])
def test_numbers_of_experts(num_tokens: int, num_experts: int, top_k: int) -> None:
    check(num_tokens, num_experts=num_experts, top_k=top_k)


def test_all_tokens_take_one_expert() -> None:
    check(70, top_k=1, only=5)


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: str(architecture.capability))
def test_every_architectures_blocks(architecture: Architecture) -> None:
    check(300, num_experts=2, top_k=2, architecture=architecture)


def test_settings_depend_on_how_many_slots_an_expert_has() -> None:
    blocks = [
        settings(KNOWN[3], num_slots=slots, num_experts=128, element_size=2, products=2).block_slots
        for slots in (72, 4096, 100_000)
    ]
    assert blocks == [16, 32, 128]
    assert settings(
        KNOWN[3], num_slots=100_000, num_experts=128, element_size=2, products=2, batch_invariant=True
    ) == settings(KNOWN[3], num_slots=8, num_experts=128, element_size=2, products=2, batch_invariant=True)


def test_batch_invariant_bits() -> None:
    """A token alone, among few and among many."""
    generator = torch.Generator().manual_seed(9)
    x = randn(generator, 40, 48, dtype=torch.bfloat16)
    gate_up, down = ((randn(generator, 8, *shape) / 7).to(torch.bfloat16) for shape in ((80, 48), (48, 40)))
    weights, experts = route_reference(randn(generator, 40, 8), 2, normalize=True)

    def run(rows: slice) -> torch.Tensor:
        return moe_mlp(x[rows], weights[rows], experts[rows], gate_up, down, batch_invariant=True, architecture=SMALL)

    everything = run(slice(0, 40))
    for rows in (slice(7, 8), slice(30, 36), slice(3, 25)):
        assert torch.equal(run(rows), everything[rows])
