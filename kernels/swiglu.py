"""The gated activation of Llama-style MLPs (N. Shazeer, "GLU variants improve transformer", 2020)."""

from __future__ import annotations

import torch


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up with silu(x) = x / (1 + exp(-x)), in float32 inside.

    gate_up [T, 2*I], gate in the first I columns. Returns [T, I] in its dtype.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(gate_up.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See `swiglu_reference`."""
    if gate_up.device.type == "cpu":
        from aiexport_edge.kernels.cpu import swiglu as cpu

        return cpu.swiglu(gate_up)
    if gate_up.is_cuda:
        from aiexport_edge.kernels.gpu import swiglu as gpu

        return gpu.swiglu(gate_up)
    return swiglu_reference(gate_up)
