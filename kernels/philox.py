"""Philox4x32-10: the counter-based generator behind every random draw.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC '11, with the
round constants of Random123. The words are laid out as in Triton's `tl.philox(seed, c0, c1, c2, c3)`: key = (low, high
half of the 64-bit seed), so a GPU kernel draws the same numbers. Knows nothing of tokens or samplers.
"""

from __future__ import annotations

import torch

ROUND_A = 0xD2511F53
ROUND_B = 0xCD9E8D57
KEY_A = 0x9E3779B9
KEY_B = 0xBB67AE85
NUM_ROUNDS = 10

_MASK = 0xFFFFFFFF


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of `constant * word`, both factors unsigned 32-bit words held in int64."""
    low_half = (word & 0xFFFF) * constant  # below 2^48
    high_half = (word >> 16) * constant + (low_half >> 16)  # below 2^49
    return high_half >> 16, ((high_half & 0xFFFF) << 16) | (low_half & 0xFFFF)


def philox_reference(
    seed: torch.Tensor, counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Four random words for each counter.

    seed: int64, the bits of a uint64. counter: four int64 tensors of values in [0, 2^32). All broadcast together.
    Returns int64 [..., 4], values in [0, 2^32).
    """
    key_a, key_b = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = counter
    for _ in range(NUM_ROUNDS):
        high_a, low_a = _multiply(ROUND_A, c0)
        high_b, low_b = _multiply(ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + KEY_A) & _MASK, (key_b + KEY_B) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform_reference(words: torch.Tensor) -> torch.Tensor:
    """float32 in (0, 1) from random words: their upper 23 bits and a half, exactly, so neither 0 nor 1 comes out."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
