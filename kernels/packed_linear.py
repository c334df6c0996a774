"""y = x Wᵀ + b with W in four or eight bits: what the GPU's products compute, and which one computes it.

Few rows: W is read once in its own bits and decoded in registers, rows stay as they are ("weight-only"). Many rows: a
card that multiplies FP8 gets the rows in FP8, rounded as they come, a scale for each row or each 128 of its inputs as
W has it; elsewhere W is decoded into memory for the library's product. On a CPU only the references run; what serves
there is `kernels.cpu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aiexport_edge.kernels.linear import linear_reference
from aiexport_edge.kernels.quantization import E4M3_MAX, Fp8Weight, QuantizedWeight

SMALLEST_SCALE = 1e-12  # of a row of zeros


def packed_linear_reference(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weightᵀ plus bias [N], in float32 inside. Returns [M, N] in x's dtype."""
    return linear_reference(x, weight.dequantize(), bias)


def quantize_rows_reference(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x [M, K] to E4M3 codes [M, K] and float32 scales [M, ceil(K / group)]: codes * scales is about x.

    A scale is the largest magnitude of its `group` inputs over 448; codes are the nearest, ties to even.
    """
    num_rows, width = x.shape
    wide = torch.nn.functional.pad(x.float(), (0, -width % group)).view(num_rows, -1, group)
    scales = (wide.abs().amax(-1) / E4M3_MAX).clamp_min(SMALLEST_SCALE)
    codes = (wide / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(num_rows, -1)[:, :width].contiguous(), scales


def fp8_linear_reference(
    codes: Tensor, scales: Tensor, group: int, weight: Fp8Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of rows from `quantize_rows_reference` with weightᵀ plus bias [N], in float32 inside: [M, N]."""
    rows = codes.float() * scales.repeat_interleave(group, 1)[:, : codes.shape[1]]
    return linear_reference(rows, weight.dequantize(), bias).to(dtype)
