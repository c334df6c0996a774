"""Pick the rows whose logits are wanted, add to rows that stand for pictures. Knows nothing of what the rows are."""

from __future__ import annotations

import torch

from aiexport_edge.kernels.threads import sharing


def gather_rows_reference(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """out[i] = hidden[rows[i]]. hidden [T, H]; rows int64 [B], each in [0, T). Returns a new [B, H] tensor."""
    return hidden[rows]


def gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See `gather_rows_reference`. On a CPU a row that is not there raises IndexError."""
    if hidden.is_cuda:
        from aiexport_edge.kernels.gpu import gather as gpu

        return gpu.gather_rows(hidden, rows)
    from aiexport_edge.kernels.cpu import gather as cpu

    if not cpu.fits(hidden):
        return torch.index_select(hidden, 0, rows)
    return cpu.gather_rows(hidden, rows)


def add_to_rows(hidden: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """hidden[rows[i]] += values[i], in place. hidden [T, H]; rows int64 [B], each once; values [B, H] of its dtype."""
    with sharing(float(values.numel())):  # a nanosecond for each
        hidden.index_add_(0, rows, values)
