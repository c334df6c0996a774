"""Products with weights of four and eight bits on a GPU. What they compute is in `aiexport_edge.kernels.packed_linear`.

Few rows are bound by reading W. A program takes a block of outputs and a part of the inputs (split-K: with few rows
there are too few blocks of outputs for the SMs), decodes a tile of W in registers, multiplies it with the rows and
scales the product, so that decoded weights are exact in 16 bits. Parts are summed in order by a second launch: no
atomics, the same bits every time.

    four bits    codes [chunks, N, HALF] bytes: byte j of a chunk holds inputs j (low half) and HALF + j of it
    eight bits   codes [N, K] bytes, E4M3 or int8, as a library takes them
    scales       [groups, N] float32, a group being GROUP_HALVES times HALF inputs; zeros [groups, N] bytes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aiexport_edge.kernels.gpu.elementwise import E4M3_DECODED_SCALE, decode_e4m3
from aiexport_edge.kernels.gpu.launch import Architecture, Launch, architecture_of, ceil_div
from aiexport_edge.kernels.quantization import Fp8Weight, Int4Weight, Int8Weight, QuantizedWeight

INT4, INT8, E4M3 = 0, 1, 2
_INT4, _E4M3 = tl.constexpr(INT4), tl.constexpr(E4M3)
HALF = 64  # inputs of a tile of W; less where a group is smaller
SMALLEST_HALF = 16
# A bfloat16 128 + n and a float16 1024 + n have n in their low bits, n < 16 here: no conversion of integers.
_BFLOAT16_128, _FLOAT16_1024 = tl.constexpr(0x4300), tl.constexpr(0x6400)


@dataclass(frozen=True, slots=True)
class CardWeight:
    """A weight [N, K] as the kernels read it. `group`: inputs that share a scale. `order`: see `Int4Weight`."""

    kind: int
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    half: int
    group: int
    order: Tensor | None

    @property
    def num_chunks(self) -> int:
        """Tiles of inputs; one of four bits is two halves."""
        return ceil_div(self.shape[1], self.half * (2 if self.kind == INT4 else 1))


def takes(weight: QuantizedWeight) -> bool:
    """Whether the weight's groups are whole tiles of inputs."""
    group = _group(weight)
    return group % HALF == 0 or group in (SMALLEST_HALF, 2 * SMALLEST_HALF)


def _group(weight: QuantizedWeight) -> int:
    """Inputs that share a scale; one that all share is as long as it must be."""
    width = weight.shape[1]
    group = weight.block[1] if isinstance(weight, Fp8Weight) else weight.group
    return group if 0 < group < width else ceil_div(width, 2 * HALF) * 2 * HALF


def pack(weight: QuantizedWeight) -> CardWeight:
    """The weight in the kernels' order, on the device where it lies. It `takes` it."""
    num_outputs, width = weight.shape
    group = _group(weight)
    half = min(HALF, group)
    if isinstance(weight, Int4Weight):
        codes = torch.nn.functional.pad(weight.codes, (0, -width % (2 * half)))
        halves = codes.view(num_outputs, -1, 2, half)
        packed = (halves[:, :, 0] | (halves[:, :, 1] << 4)).transpose(0, 1).contiguous()
        # The last tile of inputs may reach past the last group: a group of zeros, since a number there could be NaN.
        missing = -(-codes.shape[1] // group) - weight.scales.shape[1]
        padded = (torch.nn.functional.pad(each, (0, missing)) for each in (weight.scales, weight.zeros))
        scales, zeros = (each.t().contiguous() for each in padded)
        return CardWeight(INT4, weight.shape, packed, scales, zeros, half, group, weight.order)
    if isinstance(weight, Int8Weight):
        scales = weight.scales.t().contiguous()
        return CardWeight(INT8, weight.shape, weight.codes.contiguous(), scales, scales, half, group, weight.order)
    rows = weight.block[0]
    scales = weight.scales.repeat_interleave(rows, 0)[:num_outputs].t().contiguous()
    codes = weight.codes.view(torch.uint8).contiguous()
    return CardWeight(E4M3, weight.shape, codes, scales, scales, half, group, None)


@triton.jit
def decode_tile(codes, zeros, KIND: tl.constexpr, dtype: tl.constexpr):
    """A tile [outputs, inputs] of bytes to `dtype`, exact; E4M3 times 2^-8. `zeros` [outputs] are int4's."""
    if KIND == _INT4:
        wide = codes.to(tl.int16)
        if dtype == tl.bfloat16:
            shifted = (wide | _BFLOAT16_128).to(tl.bfloat16, bitcast=True)
            return shifted - (zeros.to(tl.float32) + 128.0).to(tl.bfloat16)[:, None]
        else:
            shifted = (wide | _FLOAT16_1024).to(tl.float16, bitcast=True)
            return shifted - (zeros.to(tl.float32) + 1024.0).to(tl.float16)[:, None]
    elif KIND == _E4M3:
        return decode_e4m3(codes, dtype)
    else:
        return codes.to(tl.float32).to(dtype)


@triton.jit
def _add_product(
    total,
    codes,
    inputs,
    half,
    x,
    tokens,
    outputs,
    scales,
    zeros,
    x_stride,
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP_HALVES: tl.constexpr,
    KIND: tl.constexpr,
):
    """total [outputs, tokens] plus the product of a decoded tile of W with the rows' `inputs`."""
    there = outputs < N
    group = (half // GROUP_HALVES) * N
    scale = tl.load(scales + group + outputs, mask=there, other=0.0)
    zero = tl.load(zeros + group + outputs, mask=there, other=0) if KIND == _INT4 else outputs
    inside = (inputs < K)[:, None] & (tokens < num_tokens)[None, :]
    values = tl.load(x + tokens[None, :].to(tl.int64) * x_stride + inputs[:, None], mask=inside, other=0.0)
    return total + tl.dot(decode_tile(codes, zero, KIND, values.dtype), values) * scale[:, None]


@triton.jit(do_not_specialize=["num_tokens"])
def _packed_product(
    x,
    codes,
    scales,
    zeros,
    bias,
    out,
    x_stride,
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    GROUP_HALVES: tl.constexpr,
    KIND: tl.constexpr,
    DECODED_SCALE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PER_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """out [SPLITS, tokens, N]: the product over one part of the inputs; whole and with bias where there is one part."""
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    split = tl.program_id(1)
    tokens = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    lanes = tl.arange(0, HALF)
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_TOKENS], tl.float32)
    there = (outputs < N)[:, None]
    first = split * CHUNKS_PER_SPLIT
    for chunk in range(first, tl.minimum(first + CHUNKS_PER_SPLIT, CHUNKS)):
        if KIND == _INT4:
            rows = codes + (chunk * N + outputs.to(tl.int64))[:, None] * HALF + lanes[None, :]
            both = tl.load(rows, mask=there, other=0)
            total = _add_product(
                total, both & 15, chunk * 2 * HALF + lanes, chunk * 2, x, tokens, outputs, scales, zeros, x_stride,
                num_tokens, N, K, GROUP_HALVES, KIND,
            )  # fmt: skip
            total = _add_product(
                total, both >> 4, chunk * 2 * HALF + HALF + lanes, chunk * 2 + 1, x, tokens, outputs, scales, zeros,
                x_stride, num_tokens, N, K, GROUP_HALVES, KIND,
            )  # fmt: skip
        else:
            inputs = chunk * HALF + lanes
            rows = codes + outputs[:, None].to(tl.int64) * K + inputs[None, :]
            tile = tl.load(rows, mask=there & (inputs < K)[None, :], other=0)
            total = _add_product(
                total, tile, inputs, chunk, x, tokens, outputs, scales, zeros, x_stride, num_tokens, N, K,
                GROUP_HALVES, KIND,
            )  # fmt: skip
    total *= DECODED_SCALE
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[:, None]
    places = out + (split.to(tl.int64) * num_tokens + tokens)[None, :] * N + outputs[:, None]
    tl.store(places, total.to(out.dtype.element_ty), mask=there & (tokens < num_tokens)[None, :])


@triton.jit
def _sum_splits(parts, bias, out, N: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out [tokens, N] = the sum of parts [SPLITS, tokens, N], the first one first, plus bias."""
    token = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < N
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        place = parts + (split * tl.num_programs(0) + token) * N + outputs
        total += tl.load(place, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * N + outputs, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _decode_weight(
    codes,
    scales,
    zeros,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    GROUP_HALVES: tl.constexpr,
    KIND: tl.constexpr,
    DECODED_SCALE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """out [N, K] = W in its dtype, a tile of inputs a program."""
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    half = tl.program_id(1)
    lanes = tl.arange(0, HALF)
    inputs = half * HALF + lanes
    there = outputs < N
    group = (half // GROUP_HALVES) * N
    scale = tl.load(scales + group + outputs, mask=there, other=0.0) * DECODED_SCALE
    inside = there[:, None] & (inputs < K)[None, :]
    if KIND == _INT4:
        zero = tl.load(zeros + group + outputs, mask=there, other=0)
        rows = codes + ((half // 2) * N + outputs.to(tl.int64))[:, None] * HALF + lanes[None, :]
        tile = (tl.load(rows, mask=inside, other=0) >> ((half % 2) * 4).to(tl.uint8)) & 15
    else:
        zero = outputs
        tile = tl.load(codes + outputs[:, None].to(tl.int64) * K + inputs[None, :], mask=inside, other=0)
    wide = decode_tile(tile, zero, KIND, tl.bfloat16).to(tl.float32) * scale[:, None]
    places = out + outputs[:, None].to(tl.int64) * K + inputs[None, :]
    tl.store(places, wide.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a product is cut into programs."""

    block_outputs: int
    block_tokens: int
    splits: int
    chunks_per_split: int
    num_warps: int
    num_stages: int


def settings(
    num_tokens: int, num_outputs: int, num_chunks: int, architecture: Architecture, *, batch_invariant: bool
) -> Settings:
    """Blocks of 64 outputs, and as many parts of the inputs as fill the SMs twice, each of four tiles at least.

    `batch_invariant`: the same for every number of rows.
    """
    block_tokens = 16 if batch_invariant or num_tokens <= 16 else 32 if num_tokens <= 32 else 64
    blocks = ceil_div(num_outputs, 64) * (1 if batch_invariant else ceil_div(num_tokens, block_tokens))
    splits = max(1, min(ceil_div(2 * architecture.num_sms, blocks), num_chunks // 4))
    per_split = ceil_div(num_chunks, splits)
    stages = 4 if block_tokens == 16 else 3
    num_warps = 8 if block_tokens == 64 else 4  # with four, sums and decoded tiles spill on sm_86
    return Settings(64, block_tokens, ceil_div(num_chunks, per_split), per_split, num_warps, stages)


def packed_linear_launches(
    x: Tensor,
    weight: CardWeight,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
    architecture: Architecture | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches, in order, and the tensor [M, N] that they fill. x [M, K] in bfloat16 or float16."""
    assert x.stride(1) == 1
    num_tokens, (num_outputs, width) = x.shape[0], weight.shape
    architecture = architecture or architecture_of(x.device)
    chosen = settings(num_tokens, num_outputs, weight.num_chunks, architecture, batch_invariant=batch_invariant)
    out = torch.empty((num_tokens, num_outputs), dtype=out_dtype, device=x.device)
    parts = out
    if chosen.splits > 1:
        parts = torch.empty((chosen.splits, num_tokens, num_outputs), dtype=torch.float32, device=x.device)
    has_bias, some = bias is not None, x if bias is None else bias
    grid = (
        ceil_div(num_outputs, chosen.block_outputs),
        chosen.splits,
        ceil_div(num_tokens, chosen.block_tokens),
    )
    product = Launch(
        _packed_product,
        grid,
        (x, weight.codes, weight.scales, weight.zeros, some, parts, x.stride(0), num_tokens),
        {
            "N": num_outputs,
            "K": width,
            "HALF": weight.half,
            "GROUP_HALVES": weight.group // weight.half,
            "KIND": weight.kind,
            "DECODED_SCALE": E4M3_DECODED_SCALE if weight.kind == E4M3 else 1.0,
            "CHUNKS": weight.num_chunks,
            "CHUNKS_PER_SPLIT": chosen.chunks_per_split,
            "SPLITS": chosen.splits,
            "HAS_BIAS": has_bias and chosen.splits == 1,
            "BLOCK_OUTPUTS": chosen.block_outputs,
            "BLOCK_TOKENS": chosen.block_tokens,
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
        },
    )
    if chosen.splits == 1:
        return [product], out
    total = Launch(
        _sum_splits,
        (num_tokens, ceil_div(num_outputs, 1024)),
        (parts, some, out),
        {"N": num_outputs, "SPLITS": chosen.splits, "HAS_BIAS": has_bias, "BLOCK": 1024}
        | {"num_warps": 4, "num_stages": 1},
    )
    return [product, total], out


def packed_linear(
    x: Tensor,
    weight: CardWeight,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
    architecture: Architecture | None = None,
) -> Tensor:
    """See `aiexport_edge.kernels.packed_linear.packed_linear_reference`."""
    launches, out = packed_linear_launches(
        x, weight, bias, out_dtype=out_dtype, batch_invariant=batch_invariant, architecture=architecture
    )
    for launch in launches:
        launch.run()
    return out


def decode_weight_launch(weight: CardWeight, dtype: torch.dtype) -> tuple[Launch, Tensor]:
    """The launch that decodes W into the tensor [N, K]."""
    num_outputs, width = weight.shape
    out = torch.empty((num_outputs, width), dtype=dtype, device=weight.codes.device)
    launch = Launch(
        _decode_weight,
        (ceil_div(num_outputs, 64), ceil_div(width, weight.half)),
        (weight.codes, weight.scales, weight.zeros, out),
        {
            "N": num_outputs,
            "K": width,
            "HALF": weight.half,
            "GROUP_HALVES": weight.group // weight.half,
            "KIND": weight.kind,
            "DECODED_SCALE": E4M3_DECODED_SCALE if weight.kind == E4M3 else 1.0,
            "BLOCK_OUTPUTS": 64,
            "num_warps": 4,
            "num_stages": 1,
        },
    )
    return launch, out


def decode_weight(weight: CardWeight, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`, in the order of its codes."""
    launch, out = decode_weight_launch(weight, dtype)
    launch.run()
    return out
