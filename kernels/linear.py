"""Matrix products with weights packed once for the processor's matrix units (oneDNN, through torch)."""

from __future__ import annotations

import torch


def supports_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    cpu = torch.cpu
    if cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported():
        return True
    return torch.backends.cpu.get_cpu_capability().startswith("SVE") and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] times weightᵀ, weight [N, K], plus bias [N], in float32 inside. Returns [M, N] in x's dtype."""
    out = x.float() @ weight.float().t()
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


class PackedLinear:
    """y = x Wᵀ + b. The caller may drop `weight` afterwards: only the packed copy is kept."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: torch.dtype, deterministic: bool
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.deterministic = deterministic
        self._bias = None if bias is None else bias.to(dtype)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] in `dtype` -> [M, N]."""
        if not self.deterministic:
            return self._product(x)
        return torch.cat([self._product(torch.cat((row, row)))[:1] for row in x.unsqueeze(1)])

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out
