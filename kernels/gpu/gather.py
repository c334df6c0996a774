"""Picking rows on a GPU. What it computes is in `aiexport_edge.kernels.gather`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.launch import Launch, ceil_div

BLOCK = 1024


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _gather_rows(hidden, rows, out, stride, H: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    row = tl.load(rows + index)
    values = tl.load(hidden + row * stride + columns, mask=inside, other=0.0)
    tl.store(out + index * H + columns, values, mask=inside)


def gather_rows_launch(hidden: torch.Tensor, rows: torch.Tensor) -> tuple[Launch, torch.Tensor]:
    """The launch and the tensor that it fills."""
    hidden_size = hidden.shape[1]
    assert hidden.stride(1) == 1
    out = torch.empty((rows.shape[0], hidden_size), dtype=hidden.dtype, device=hidden.device)
    launch = Launch(
        _gather_rows,
        (rows.shape[0], ceil_div(hidden_size, BLOCK)),
        (hidden, rows, out, hidden.stride(0)),
        {"H": hidden_size, "BLOCK": BLOCK, "num_warps": 4, "num_stages": 1},
    )
    return launch, out


def gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """See `aiexport_edge.kernels.gather.gather_rows_reference`."""
    launch, out = gather_rows_launch(hidden, rows)
    launch.run()
    return out
