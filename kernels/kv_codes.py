"""Keys and values as FP8 (E4M3) codes with one scale a KV head: value = code * scale.

E4M3 as in P. Micikevicius et al., "FP8 Formats for Deep Learning", 2022: no infinities, 448 is the largest value.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0


def encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [..., Hkv, D] of `values` in the same shape; scale float32 [Hkv]. Saturates at ±448 * scale."""
    return (values.float() / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode(codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """float32 of a cache's pages [pages, Hkv, tokens, D]: float8_e4m3fn or uint8 codes with a scale float32 [Hkv].

    Without a scale, the values as they are.
    """
    if scale is None:
        return codes.float()
    return codes.view(torch.float8_e4m3fn).float() * scale[:, None, None]
