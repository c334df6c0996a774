"""The mend of vLLM's low-rank products on a processor: tokens without an adapter get nothing."""

from __future__ import annotations

import torch

from aiexport_edge.engine.backends.vllm.adapters import without_the_last_slot


def bgmv_shrink(
    inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, slots: torch.Tensor, scaling: float = 1.0
) -> None:
    """As vLLM 0.32 has it: a slot of -1 is the last."""
    output[:, : weights.shape[1]] = scaling * torch.einsum("bi, boi -> bo", inputs, weights[slots])


def test_tokens_without_an_adapter() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(4, 6, generator=generator), torch.randn(2, 3, 6, generator=generator)
    slots = torch.tensor([1, -1, 0, -1])
    output = torch.full((4, 3), float("nan"))
    without_the_last_slot(bgmv_shrink)(inputs, weights, output, slots, scaling=2.0)
    expected = 2 * torch.stack([weights[1] @ inputs[0], torch.zeros(3), weights[0] @ inputs[2], torch.zeros(3)])
    torch.testing.assert_close(output, expected)
