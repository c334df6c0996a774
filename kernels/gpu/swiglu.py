"""SwiGLU on a GPU. What it computes is in `aiexport_edge.kernels.swiglu`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.launch import Launch, ceil_div

BLOCK = 1024  # columns a program: 8 elements a thread, one 16-byte load for each half


@triton.jit
def _swiglu(gate_up, out, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + columns, result.to(out.dtype.element_ty), mask=inside)


def swiglu_launch(gate_up: torch.Tensor) -> tuple[Launch, torch.Tensor]:
    """The launch and the tensor that it fills."""
    num_rows, width = gate_up.shape
    assert gate_up.stride(1) == 1
    assert width % 2 == 0
    out = torch.empty((num_rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    launch = Launch(
        _swiglu,
        (num_rows, ceil_div(width // 2, BLOCK)),
        (gate_up, out, gate_up.stride(0)),
        {"SIZE": width // 2, "BLOCK": BLOCK, "num_warps": 4, "num_stages": 1},
    )
    return launch, out


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See `aiexport_edge.kernels.swiglu.swiglu_reference`."""
    launch, out = swiglu_launch(gate_up)
    launch.run()
    return out
