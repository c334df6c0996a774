"""RMS norm on a GPU: one program holds one row in registers, so every input is read once and every output written once.

What it computes is in `aiexport_edge.kernels.rms_norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.elementwise import E4M3_LARGEST, ROUND_TO_INTEGER, encode_e4m3, num_warps_for
from aiexport_edge.kernels.gpu.launch import Launch, next_power_of_2

LARGEST_ROW = 65536  # above it a row no longer fits the registers of one block
INT8_LARGEST = tl.constexpr(127.0)


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    total,
    normed,
    scales,
    x_stride,
    residual_stride,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """normed = rms_norm(x + residual) * weight; total = x + residual. QUANTIZE: 0 none, 1 E4M3, 2 int8, per row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * H + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / H + eps)
    result = values * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if QUANTIZE == 0:
        tl.store(normed + row * H + columns, result.to(normed.dtype.element_ty), mask=inside)
    else:
        largest = tl.max(tl.abs(result), axis=0)
        if QUANTIZE == 1:
            row_scale = tl.maximum(tl.div_rn(largest, E4M3_LARGEST), 1e-12)
            codes = encode_e4m3(tl.div_rn(result, row_scale))
        else:
            row_scale = tl.maximum(tl.div_rn(largest, INT8_LARGEST), 1e-12)
            codes = ((tl.div_rn(result, row_scale) + ROUND_TO_INTEGER) - ROUND_TO_INTEGER).to(tl.int8)
        tl.store(normed + row * H + columns, codes, mask=inside)
        tl.store(scales + row, row_scale)


def settings(hidden_size: int) -> dict[str, int]:
    """Block and warps for a row of `hidden_size`: 16 elements a thread, two 16-byte loads in flight for each input."""
    block = next_power_of_2(hidden_size)
    return {"BLOCK": block, "num_warps": num_warps_for(block, per_thread=16, most=32), "num_stages": 1}


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor,
    normed: torch.Tensor,
    scales: torch.Tensor,
) -> Launch:
    num_rows, hidden_size = x.shape
    if hidden_size > LARGEST_ROW:
        raise ValueError(f"rows of {hidden_size} are longer than {LARGEST_ROW}")
    assert x.stride(1) == 1
    assert residual is None or residual.stride(1) == 1
    quantize = {torch.uint8: 1, torch.int8: 2}.get(normed.dtype, 0)
    other = x if residual is None else residual
    return Launch(
        _rms_norm,
        (num_rows,),
        (x, other, weight, total, normed, scales, x.stride(0), other.stride(0), eps),
        {"H": hidden_size, "ADD": residual is not None, "QUANTIZE": quantize, **settings(hidden_size)},
    )


def rms_norm_launch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[Launch, torch.Tensor]:
    """The launch and the tensor that it fills."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _launch(x, None, weight, eps, out, out, out), out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `aiexport_edge.kernels.rms_norm.rms_norm_reference`."""
    launch, out = rms_norm_launch(x, weight, eps)
    launch.run()
    return out


def add_rms_norm_launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch and the tensors that it fills: normed, total."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(normed)
    return _launch(x, residual, weight, eps, total, normed, normed), normed, total


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `aiexport_edge.kernels.rms_norm.add_rms_norm_reference`."""
    launch, normed, total = add_rms_norm_launch(x, residual, weight, eps)
    launch.run()
    return normed, total


def add_rms_norm_quantized_launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[Launch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The launch and the tensors that it fills: codes (bytes where they are E4M3), scales, total."""
    storage = torch.int8 if dtype == torch.int8 else torch.uint8
    codes = torch.empty(x.shape, dtype=storage, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _launch(x, residual, weight, eps, total, codes, scales), codes, scales, total


def add_rms_norm_quantized(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `aiexport_edge.kernels.rms_norm_quantized.add_rms_norm_quantized_reference`."""
    launch, codes, scales, total = add_rms_norm_quantized_launch(x, residual, weight, eps, dtype)
    launch.run()
    return codes.view(dtype), scales, total
