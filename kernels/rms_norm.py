"""Root mean square norm (B. Zhang, R. Sennrich, 2019), alone and with the residual sum before it."""

from __future__ import annotations

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight, in float32 inside. x [T, H], weight [H]. Returns [T, H] in x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `rms_norm_reference`."""
    if x.device.type == "cpu":
        from aiexport_edge.kernels.cpu import norm as cpu

        return cpu.rms_norm(x, weight, eps)
    if x.is_cuda:
        from aiexport_edge.kernels.gpu import rms_norm as gpu

        return gpu.rms_norm(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the sum, the sum), the sum rounded to x's dtype before it is normed. x, residual [T, H]; weight [H]."""
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm_reference(total, weight, eps), total


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `add_rms_norm_reference`."""
    if x.device.type == "cpu":
        from aiexport_edge.kernels.cpu import norm as cpu

        return cpu.add_rms_norm(x, residual, weight, eps)
    if x.is_cuda:
        from aiexport_edge.kernels.gpu import rms_norm as gpu

        return gpu.add_rms_norm(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)
