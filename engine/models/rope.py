"""Tables of rotary position embedding (RoFormer, arXiv 2104.09864), with the scalings that long contexts use.

Owns the frequencies. Knows nothing of how they are applied (`kernels/qk_norm_rope.py`) nor of who sits at a position.
Every variant takes the steps of transformers' `modeling_rope_utils` in their order and precision: the tables are equal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aiexport_edge.engine.models.config import Rope


def cos_sin_table(rope: Rope, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """The angles of positions 0 … max_positions-1, times the scaling's attention factor.

    Returns float32 [max_positions, head_dim]: the cosines of the head_dim/2 frequencies, then their sines.
    """
    inv_freq, attention_factor = inverse_frequencies(rope, head_dim)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inv_freq
    table = torch.empty(max_positions, head_dim, dtype=torch.float32)
    table[:, : head_dim // 2] = angles.cos() * attention_factor
    table[:, head_dim // 2 :] = angles.sin() * attention_factor
    return table.to(device)


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """float32 [head_dim/2] radians per position, and the factor that cosines and sines are multiplied by."""
    if rope.kind == "yarn":
        return _yarn(rope, head_dim)
    inv_freq = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        inv_freq /= rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(rope, inv_freq)
    # "dynamic" is the default up to max_position_embeddings, where its context ends.
    return inv_freq, 1.0


def _llama3(rope: Rope, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: short wavelengths stay, long ones stretch by `factor`, those between are interpolated."""
    length = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    longest, shortest = length / rope.low_freq_factor, length / rope.high_freq_factor
    scaled = torch.where(wavelength > longest, inv_freq / rope.factor, inv_freq)
    smooth = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelength < shortest) & ~(wavelength > longest)
    return torch.where(between, smoothed, scaled)


def _yarn(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, a ramp between them."""
    length = rope.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    frequency = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inv_freq = 1.0 / (rope.factor * frequency) * (1 - keep) + 1.0 / frequency * keep
    return inv_freq, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
