"""Weights in eight bits. Knows no product."""

from __future__ import annotations

import torch


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] in any float dtype to int8 [N, K] in -127 … 127 and float32 scales [N].

    Symmetric, one scale per output: weight[n] is about values[n] * scales[n], no number further off than half a scale.
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1).clamp_(min=1e-30) / 127
    return (wide / scales[:, None]).round_().to(torch.int8), scales
