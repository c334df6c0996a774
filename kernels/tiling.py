"""Sizes of tiles in which a product gives a row the same bits, whatever stands beside it: found by trial.

A library chooses its loops by the number of rows, and otherwise on each processor, for each dtype and shape. Owns the
sizes to try and the trial. Knows no library.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Product = Callable[[torch.Tensor], torch.Tensor]  # [M, K] -> [M, N]

# Sets of tile sizes to try, the fastest first. A row by itself is always its own equal.
TILINGS = (
    (1, 2, 4, 8, 16, 32, 64, 128),
    (2, 4, 8, 16, 32, 64, 128),
    (1, 2, 4, 8, 16, 32),
    (2, 4, 8, 16, 32),
    (4, 8, 16, 32),
    (32,),
    (16,),
    (1,),
)


def trial_operands(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and rows [M, K], as many as the largest tile has, whose products cancel: what is left is
    rounding, and shows any other order of the sums.
    """
    generator = np.random.default_rng(0)
    half = in_features // 2
    order = torch.from_numpy(generator.permutation(in_features))

    def draw(number: int, width: int) -> torch.Tensor:
        return torch.from_numpy(generator.standard_normal((number, width), dtype=np.float32)).to(dtype)

    def rows(number: int, sign: float) -> torch.Tensor:
        first = draw(number, half)
        rest = draw(number, in_features - 2 * half) * 1e-6
        return torch.cat((first, sign * first, rest), dim=1)[:, order].contiguous().to(device)

    return rows(out_features, -1.0), rows(max(max(tiling) for tiling in TILINGS), 1.0)


def agree(product: Product, rows: torch.Tensor, tiling: tuple[int, ...]) -> bool:
    """Whether tiles of these sizes give each row the same bits, wherever it stands in them."""
    largest = tiling[-1]
    expected = product(rows[:largest])
    moved = product(rows[:largest].roll(largest // 3, dims=0)).roll(-(largest // 3), dims=0)
    if not torch.equal(moved, expected):
        return False
    for size in tiling[:-1]:
        for start in {0, largest // 3, largest - size}:
            if start + size <= largest and not torch.equal(
                product(rows[start : start + size]), expected[start : start + size]
            ):
                return False
    return True


def find_tiling(product: Product, rows: torch.Tensor, num_threads: int) -> tuple[int, ...]:
    """The fastest tiling in which `product` gives `rows` (`trial_operands`) the same bits, with one thread and with
    `num_threads` alike.
    """

    def agrees(tiling: tuple[int, ...]) -> bool:
        if not agree(product, rows, tiling):
            return False
        if num_threads == 1:
            return True
        several = product(rows[: tiling[-1]])
        torch.set_num_threads(1)
        try:
            return agree(product, rows, tiling) and torch.equal(product(rows[: tiling[-1]]), several)
        finally:
            torch.set_num_threads(num_threads)

    return next((tiling for tiling in TILINGS[:-1] if agrees(tiling)), TILINGS[-1])
