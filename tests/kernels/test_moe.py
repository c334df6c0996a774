"""Experts on the CPU against the reference, and the reference against transformers' layer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.kernel_cases import assert_close, randn

from aiexport_edge.kernels.moe import Experts, moe_mlp_reference, route, route_reference


def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = (randn(generator, 8, 2 * 48, 64) / 8).to(dtype)
    return gate_up, (randn(generator, 8, 64, 48) / 7).to(dtype)


def each(gate_up: torch.Tensor, down: torch.Tensor) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    for expert in range(len(down)):
        yield list(gate_up[expert].chunk(2)), down[expert]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 31])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_experts_match_the_reference(num_tokens: int, top_k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    gate_up, down = make(generator, dtype)
    x = randn(generator, num_tokens, 64, dtype=dtype)
    weights, experts = route(randn(generator, num_tokens, 8), top_k, normalize=True)
    actual = Experts(each(gate_up, down), dtype=dtype, deterministic=False)(x, weights, experts)
    assert_close(actual, moe_mlp_reference(x, weights, experts, gate_up, down), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_bits_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    gate_up, down = make(generator, dtype)
    packed = Experts(each(gate_up, down), dtype=dtype, deterministic=True)
    x = randn(generator, 50, 64, dtype=dtype)
    weights, experts = route(randn(generator, 50, 8), 2, normalize=True)
    together = packed(x, weights, experts)
    for token in (0, 17, 49):
        one = slice(token, token + 1)
        assert torch.equal(packed(x[one], weights[one], experts[one]), together[one])


@pytest.mark.parametrize("normalize", [False, True])
def test_the_reference_is_transformers_layer(normalize: bool) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=3, norm_topk_prob=normalize
    )
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(randn(generator, *parameter.shape) / 6)
        x = randn(generator, 20, 64)
        weights, experts = route_reference(x @ block.gate.weight.t(), 3, normalize=normalize)
        actual = moe_mlp_reference(x, weights, experts, block.experts.gate_up_proj, block.experts.down_proj)
        torch.testing.assert_close(actual, block(x[None])[0], rtol=1e-4, atol=1e-5)
