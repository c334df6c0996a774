"""A mixture whose experts have four or eight bits, on a GPU. What it computes is in `aiexport_edge.kernels.moe`.

Slots, blocks of slots and the order of an expert's slots are `moe`'s; weights of all experts of a layer lie one after
the other, each as `packed_linear` has it. A program takes a block of slots of one expert and some of its outputs, and
decodes its tiles of the weight in registers; gate and up are taken by the same program, which leaves what comes between
the two products. Few tokens: each slot is a block by itself, and nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aiexport_edge.kernels.gpu.elementwise import E4M3_DECODED_SCALE
from aiexport_edge.kernels.gpu.launch import Architecture, Launch, architecture_of, ceil_div, shared_limit
from aiexport_edge.kernels.gpu.moe import FEW_TOKENS, sort_launches, sum_launch
from aiexport_edge.kernels.gpu.packed_linear import E4M3, INT4, CardWeight, decode_tile, pack, takes
from aiexport_edge.kernels.quantization import QuantizedWeight

DTYPES = (torch.bfloat16, torch.float16)
MOST_SLOTS = 64  # of a block: with more, sums and decoded tiles do not stay in registers
_INT4 = tl.constexpr(INT4)


@dataclass(frozen=True, slots=True)
class CardExperts:
    """A layer's experts as the kernels read them: gate_up's shape is (2 * I, H), gate rows first; down's (H, I).

    Tensors have the experts as their first axis; `order` is int64 [E, K] where it is there.
    """

    gate_up: CardWeight
    down: CardWeight

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return self.down.codes.shape[0]


def stack_experts(gate_up: Sequence[QuantizedWeight], down: Sequence[QuantizedWeight]) -> CardExperts | None:
    """The experts on the device where they lie, or None where the kernels do not take them, or they differ in form."""
    stacked = [_stack(gate_up), _stack(down)]
    return CardExperts(stacked[0], stacked[1]) if stacked[0] is not None and stacked[1] is not None else None


def _stack(weights: Sequence[QuantizedWeight]) -> CardWeight | None:
    if not all(takes(weight) for weight in weights):
        return None
    packed = [pack(weight) for weight in weights]
    first = packed[0]
    if any((each.kind, each.shape, each.half, each.group) != _form(first) for each in packed):
        return None
    orders = None
    if any(each.order is not None for each in packed):
        in_order = torch.arange(first.shape[1], device=first.codes.device)
        orders = torch.stack([in_order if each.order is None else each.order for each in packed])
    codes, scales, zeros = (torch.stack([getattr(each, n) for each in packed]) for n in ("codes", "scales", "zeros"))
    return CardWeight(first.kind, first.shape, codes, scales, zeros, first.half, first.group, orders)


def _form(weight: CardWeight) -> tuple[int, tuple[int, int], int, int]:
    return weight.kind, weight.shape, weight.half, weight.group


@triton.jit
def _add_product(
    total, codes, values, outputs, scales, zeros, half, N: tl.constexpr, ROWS: tl.constexpr,
    GROUP_HALVES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """total [outputs, slots] plus the product of a tile [outputs, inputs] of codes with values [inputs, slots]."""
    group = (half // GROUP_HALVES) * ROWS
    scale = tl.load(scales + group + outputs, mask=outputs < N, other=0.0)
    zero = tl.load(zeros + group + outputs, mask=outputs < N, other=0) if KIND == _INT4 else outputs
    return total + tl.dot(decode_tile(codes, zero, KIND, values.dtype), values) * scale[:, None]


@triton.jit
def _values(rows, order, inputs, there, K: tl.constexpr, HAS_ORDER: tl.constexpr):
    """A tile [inputs, slots] of the slots' rows."""
    places = inputs
    if HAS_ORDER:
        places = tl.load(order + inputs, mask=inputs < K, other=0)
    return tl.load(rows[None, :] + places[:, None], mask=(inputs < K)[:, None] & there[None, :], other=0.0)


@triton.jit
def _expert_product(
    x,
    weights,
    ordered,
    experts,
    codes,
    scales,
    zeros,
    order,
    out,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    SHARING: tl.constexpr,
    HALF: tl.constexpr,
    GROUP_HALVES: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    KIND: tl.constexpr,
    DECODED_SCALE: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_SORTED: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """A block of slots of one expert: out [slots, N].

    SHARING slots have one row of x. IS_GATED: the expert has N gate rows and N up rows, and out is what their SwiGLU
    gives, in its dtype; else each slot's product times its weight. `experts`: of blocks, or of slots if not IS_SORTED.
    """
    block = tl.program_id(1)
    expert = tl.load(experts + block).to(tl.int64)
    if expert < 0:
        return
    ROWS: tl.constexpr = 2 * N if IS_GATED else N
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    slot_lanes, lanes = tl.arange(0, BLOCK_SLOTS), tl.arange(0, HALF)
    if IS_SORTED:
        slots = tl.load(ordered + block * BLOCK_SLOTS + slot_lanes).to(tl.int64)
    else:
        slots = tl.where(slot_lanes == 0, block, -1).to(tl.int64)
    there = slots >= 0
    slots = tl.where(there, slots, 0)
    rows = x + (slots // SHARING) * x_stride
    is_output = (outputs < N)[:, None]
    scales += expert * (GROUPS * ROWS)
    zeros += expert * (GROUPS * ROWS)
    order += expert * K
    codes += expert * (CHUNKS * ROWS * HALF if KIND == _INT4 else ROWS * K)
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_SLOTS], tl.float32)
    up = tl.zeros([BLOCK_OUTPUTS, BLOCK_SLOTS], tl.float32)
    for chunk in range(CHUNKS):
        if KIND == _INT4:
            tile = codes + (chunk * ROWS + outputs)[:, None] * HALF + lanes[None, :]
            inputs = chunk * 2 * HALF + lanes
            low = _values(rows, order, inputs, there, K, HAS_ORDER)
            high = _values(rows, order, inputs + HALF, there, K, HAS_ORDER)
            both = tl.load(tile, mask=is_output, other=0)
            total = _add_product(total, both & 15, low, outputs, scales, zeros, chunk * 2, N, ROWS, GROUP_HALVES, KIND)
            total = _add_product(
                total, both >> 4, high, outputs, scales, zeros, chunk * 2 + 1, N, ROWS, GROUP_HALVES, KIND
            )
            if IS_GATED:
                both = tl.load(tile + N * HALF, mask=is_output, other=0)
                up = _add_product(
                    up, both & 15, low, outputs, scales + N, zeros + N, chunk * 2, N, ROWS, GROUP_HALVES, KIND
                )
                up = _add_product(
                    up, both >> 4, high, outputs, scales + N, zeros + N, chunk * 2 + 1, N, ROWS, GROUP_HALVES, KIND
                )
        else:
            inputs = chunk * HALF + lanes
            tile = codes + outputs[:, None] * K + inputs[None, :]
            inside = is_output & (inputs < K)[None, :]
            values = _values(rows, order, inputs, there, K, HAS_ORDER)
            own = tl.load(tile, mask=inside, other=0)
            total = _add_product(total, own, values, outputs, scales, zeros, chunk, N, ROWS, GROUP_HALVES, KIND)
            if IS_GATED:
                own = tl.load(tile + N * K, mask=inside, other=0)
                up = _add_product(up, own, values, outputs, scales + N, zeros, chunk, N, ROWS, GROUP_HALVES, KIND)
    total *= DECODED_SCALE
    if IS_GATED:
        total = total / (1.0 + tl.exp(-total)) * (up * DECODED_SCALE)
    else:
        total *= tl.load(weights + slots, mask=there, other=0.0)[None, :]
    places = out + slots[None, :] * N + outputs[:, None]
    tl.store(places, total.to(out.dtype.element_ty), mask=is_output & there[None, :])


@dataclass(frozen=True, slots=True)
class Settings:
    """Slots and outputs of a block."""

    block_slots: int
    block_outputs: int
    num_warps: int
    num_stages: int


def settings(
    architecture: Architecture, *, num_slots: int, num_experts: int, is_gated: bool, batch_invariant: bool
) -> Settings:
    """From shapes alone; `batch_invariant`: from the model's alone. Two products in one program take half the outputs
    each: few slots make too few programs otherwise, and sums of many slots stay in registers on data-centre cards only.
    """
    slots = 16
    while slots < MOST_SLOTS and slots * num_experts < num_slots and not batch_invariant:
        slots *= 2
    holds_both = slots > 16 and architecture.capability in (90, 100)
    outputs = 32 if is_gated and not holds_both else 64
    stages = 4 if slots == 16 and shared_limit(architecture.capability) > 150_000 else 3
    return Settings(slots, outputs, 4 if slots < MOST_SLOTS else 8, stages)


def _product(
    x: Tensor,
    weights: Tensor,
    ordered: Tensor,
    experts: Tensor,
    weight: CardWeight,
    out: Tensor,
    chosen: Settings,
    *,
    sharing: int,
    is_gated: bool,
    is_sorted: bool,
) -> Launch:
    num_outputs = weight.shape[0] // 2 if is_gated else weight.shape[0]
    return Launch(
        _expert_product,
        (ceil_div(num_outputs, chosen.block_outputs), experts.numel()),
        (
            x,
            weights,
            ordered,
            experts,
            weight.codes,
            weight.scales,
            weight.zeros,
            ordered if weight.order is None else weight.order,
            out,
            x.stride(0),
        ),
        {
            "N": num_outputs,
            "K": weight.shape[1],
            "SHARING": sharing,
            "HALF": weight.half,
            "GROUP_HALVES": weight.group // weight.half,
            "GROUPS": weight.scales.shape[1],
            "CHUNKS": weight.num_chunks,
            "KIND": weight.kind,
            "DECODED_SCALE": E4M3_DECODED_SCALE if weight.kind == E4M3 else 1.0,
            "IS_GATED": is_gated,
            "IS_SORTED": is_sorted,
            "HAS_ORDER": weight.order is not None,
            "BLOCK_OUTPUTS": chosen.block_outputs,
            "BLOCK_SLOTS": chosen.block_slots,
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
        },
    )


def packed_moe_launches(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    packed: CardExperts,
    *,
    batch_invariant: bool = False,
    architecture: Architecture | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches, in order, and the tensor [T, H] that they fill. x [T, H] in bfloat16 or float16."""
    assert x.stride(1) == 1
    assert x.dtype in DTYPES
    assert weights.is_contiguous()
    assert experts.is_contiguous()
    architecture = architecture or architecture_of(x.device)
    (num_tokens, hidden), top_k = x.shape, experts.shape[1]
    num_slots, size = num_tokens * top_k, packed.down.shape[1]
    is_sorted = num_tokens > FEW_TOKENS or batch_invariant
    launches: list[Launch] = []
    ordered, block_experts = experts, experts

    def settings_of(is_gated: bool) -> Settings:
        return settings(
            architecture,
            num_slots=num_slots if is_sorted else 0,
            num_experts=packed.num_experts,
            is_gated=is_gated,
            batch_invariant=batch_invariant,
        )

    first, second = settings_of(True), settings_of(False)
    if is_sorted:
        launches, ordered, block_experts = sort_launches(experts, packed.num_experts, first.block_slots)
    inner = torch.empty((num_slots, size), dtype=x.dtype, device=x.device)
    parts = torch.empty((num_slots, hidden), dtype=torch.float32, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launches += [
        _product(
            x, weights, ordered, block_experts, packed.gate_up, inner, first,
            sharing=top_k, is_gated=True, is_sorted=is_sorted,
        ),
        _product(
            inner, weights, ordered, block_experts, packed.down, parts, second,
            sharing=1, is_gated=False, is_sorted=is_sorted,
        ),
        sum_launch(parts, out, top_k),
    ]  # fmt: skip
    return launches, out


def packed_moe(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    packed: CardExperts,
    *,
    batch_invariant: bool = False,
    architecture: Architecture | None = None,
) -> Tensor:
    """See `aiexport_edge.kernels.moe.moe_mlp_reference`, of the decoded weights."""
    launches, out = packed_moe_launches(
        x, weights, experts, packed, batch_invariant=batch_invariant, architecture=architecture
    )
    for launch in launches:
        launch.run()
    return out
