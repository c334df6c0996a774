"""Pick the rows whose logits are wanted. Knows nothing of what the rows are."""

from __future__ import annotations

import torch


def gather_rows_reference(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """out[i] = hidden[rows[i]]. hidden [T, H]; rows int64 [B], each in [0, T). Returns a new [B, H] tensor."""
    return hidden[rows]


def gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See `gather_rows_reference`."""
    if hidden.is_cuda:
        from aiexport_edge.kernels.gpu import gather as gpu

        return gpu.gather_rows(hidden, rows)
    from aiexport_edge.kernels.cpu import gather as cpu

    return cpu.gather_rows(hidden, rows) if cpu.fits(hidden) else torch.index_select(hidden, 0, rows)
