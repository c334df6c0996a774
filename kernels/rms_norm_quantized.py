"""Residual sum and RMS norm whose output is quantized row by row, for products with 8-bit activations."""

from __future__ import annotations

import torch

from aiexport_edge.kernels.rms_norm import add_rms_norm_reference

SMALLEST_SCALE = 1e-12  # of a row of zeros
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def add_rms_norm_quantized_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [T, H], scales float32 [T], the sum [T, H]): codes * scales is the norm of x + residual, in float32.

    x, residual [T, H]; weight [H]; dtype float8_e4m3fn or int8. A row's scale is its largest magnitude over the type's;
    codes are rounded to nearest, ties to even.
    """
    _, total = add_rms_norm_reference(x, residual, weight, eps)
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    scales = (normed.abs().amax(dim=-1) / LARGEST[dtype]).clamp(min=SMALLEST_SCALE)
    scaled = normed / scales.unsqueeze(1)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales, total


def add_rms_norm_quantized(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `add_rms_norm_quantized_reference`."""
    if x.is_cuda:
        from aiexport_edge.kernels.gpu import rms_norm as gpu

        return gpu.add_rms_norm_quantized(x, residual, weight, eps, dtype)
    return add_rms_norm_quantized_reference(x, residual, weight, eps, dtype)
