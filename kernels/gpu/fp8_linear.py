"""Products of FP8 rows with FP8 weights on a GPU. What they compute is in `aiexport_edge.kernels.packed_linear`.

For many rows, on cards that multiply FP8 (compute capability 8.9 and newer). The sum of 128 inputs is taken by the
matrix units and added to the total in float32 with its scales: their own accumulation is too short to run on (A. Liu
et al., "DeepSeek-V3 Technical Report", 2024, 3.3.2). Weights are `packed_linear.CardWeight`s of E4M3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aiexport_edge.kernels.gpu.elementwise import E4M3_LARGEST, encode_e4m3, num_warps_for
from aiexport_edge.kernels.gpu.launch import Launch, ceil_div, next_power_of_2
from aiexport_edge.kernels.gpu.packed_linear import CardWeight

BLOCK_INPUTS = 128
LOWEST_CAPABILITY = 89


@triton.jit
def _quantize_rows(x, codes, scales, x_stride, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """One group of one row's inputs, to E4M3 bytes and their scale."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    columns = group * GROUP + lanes
    inside = (columns < K) & (lanes < GROUP)
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), E4M3_LARGEST), 1e-12)
    tl.store(codes + row * K + columns, encode_e4m3(tl.div_rn(values, scale)), mask=inside)
    tl.store(scales + row * tl.num_programs(1) + group, scale)


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_product(
    rows,
    row_scales,
    codes,
    scales,
    bias,
    out,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """A block of out [rows, N]. GROUPS 1: rows and weights have one scale each; else one for each block of inputs."""
    tokens = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    lanes = tl.arange(0, BLOCK_INPUTS)
    is_row, is_output = tokens < num_rows, outputs < N
    left = rows + tokens[:, None].to(tl.int64) * K + lanes[None, :]
    right = codes + outputs[None, :].to(tl.int64) * K + lanes[:, None]
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for block in range(0, (K + BLOCK_INPUTS - 1) // BLOCK_INPUTS):
        inside = lanes < K - block * BLOCK_INPUTS
        a = tl.load(left + block * BLOCK_INPUTS, mask=is_row[:, None] & inside[None, :], other=0)
        b = tl.load(right + block * BLOCK_INPUTS, mask=inside[:, None] & is_output[None, :], other=0)
        a, b = a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
        if GROUPS == 1:
            total = tl.dot(a, b, total, max_num_imprecise_acc=BLOCK_INPUTS)
        else:
            product = tl.dot(a, b)
            row_scale = tl.load(row_scales + tokens * GROUPS + block, mask=is_row, other=0.0)
            scale = tl.load(scales + block * N + outputs, mask=is_output, other=0.0)
            total += product * row_scale[:, None] * scale[None, :]
    if GROUPS == 1:
        row_scale = tl.load(row_scales + tokens, mask=is_row, other=0.0)
        total *= row_scale[:, None] * tl.load(scales + outputs, mask=is_output, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    places = out + tokens[:, None].to(tl.int64) * N + outputs[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


def takes(weight: CardWeight) -> bool:
    """Whether the weight's scales are for whole rows or for blocks of 128 inputs."""
    return weight.group == BLOCK_INPUTS or weight.scales.shape[0] == 1


def group_of(weight: CardWeight) -> int:
    """Inputs of a row that share a scale."""
    return weight.shape[1] if weight.scales.shape[0] == 1 else weight.group


def quantize_rows_launch(x: Tensor, group: int) -> tuple[Launch, Tensor, Tensor]:
    """The launch and what it fills: codes uint8 [M, K], scales [M, groups]."""
    assert x.stride(1) == 1
    num_rows, width = x.shape
    groups, block = ceil_div(width, group), next_power_of_2(group)
    codes = torch.empty((num_rows, width), dtype=torch.uint8, device=x.device)
    scales = torch.empty((num_rows, groups), dtype=torch.float32, device=x.device)
    launch = Launch(
        _quantize_rows,
        (num_rows, groups),
        (x, codes, scales, x.stride(0)),
        {"K": width, "GROUP": group, "BLOCK": block, "num_warps": num_warps_for(block, per_thread=16), "num_stages": 1},
    )
    return launch, codes, scales


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """See `aiexport_edge.kernels.packed_linear.quantize_rows_reference`; codes as bytes."""
    launch, codes, scales = quantize_rows_launch(x, group)
    launch.run()
    return codes, scales


def fp8_linear_launch(
    codes: Tensor, scales: Tensor, weight: CardWeight, bias: Tensor | None, *, out_dtype: torch.dtype
) -> tuple[Launch, Tensor]:
    """The launch and the tensor [M, N] that it fills; `codes` bytes [M, K] and `scales` from `quantize_rows`."""
    num_rows, (num_outputs, width) = codes.shape[0], weight.shape
    out = torch.empty((num_rows, num_outputs), dtype=out_dtype, device=codes.device)
    block_rows = 64 if num_rows <= 64 else 128
    launch = Launch(
        _fp8_product,
        (ceil_div(num_rows, block_rows), ceil_div(num_outputs, 128)),
        (codes, scales, weight.codes, weight.scales, scales if bias is None else bias, out, num_rows),
        {
            "N": num_outputs,
            "K": width,
            "GROUPS": scales.shape[1],
            "HAS_BIAS": bias is not None,
            "BLOCK_ROWS": block_rows,
            "BLOCK_OUTPUTS": 128,
            "BLOCK_INPUTS": BLOCK_INPUTS,
            "num_warps": 8,
            "num_stages": 3,
        },
    )
    return launch, out


def fp8_linear(
    codes: Tensor, scales: Tensor, weight: CardWeight, bias: Tensor | None, *, out_dtype: torch.dtype
) -> Tensor:
    """See `aiexport_edge.kernels.packed_linear.fp8_linear_reference`."""
    launch, out = fp8_linear_launch(codes, scales, weight, bias, out_dtype=out_dtype)
    launch.run()
    return out
