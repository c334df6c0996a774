"""Pick the rows whose logits are wanted. Knows nothing of what the rows are."""

from __future__ import annotations

import torch

from aiexport_edge.kernels.threads import is_recording


def gather_rows_reference(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """out[i] = hidden[rows[i]]. hidden [T, H]; rows int64 [B], each in [0, T). Returns a new [B, H] tensor."""
    return hidden[rows]


def gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See `gather_rows_reference`."""
    if hidden.is_cuda:
        from aiexport_edge.kernels.gpu import gather as gpu

        return gpu.gather_rows(hidden, rows)
    from aiexport_edge.kernels.cpu import gather as cpu

    if not cpu.fits(hidden):
        return torch.index_select(hidden, 0, rows)
    if not is_recording() and rows.numel():  # a kernel would read whatever lies there
        lowest, highest = (int(row) for row in rows.aminmax())
        if lowest < 0 or highest >= hidden.shape[0]:
            raise IndexError(f"rows {lowest} to {highest} of {hidden.shape[0]}")
    return cpu.gather_rows(hidden, rows)
