"""A mixture of experts on a GPU. What it computes is in `aiexport_edge.kernels.moe`.

A token's choice of an expert is a slot: slot t * k + j is token t's j-th expert. Few tokens: a program takes one slot
(or token) and some outputs, and reads the expert's rows once, without sorting. Many: slots are put in order of their
experts on the device, each expert's padded to whole blocks, and two grouped products run over the blocks. The grid
depends on shapes alone; surplus programs return; the host waits for nothing.

    slots by expert   |e0 e0 e0 . |e2 e2 e2 e2|e2 . . . |    blocks of 4; '.' is padding
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.launch import (
    Architecture,
    Launch,
    architecture_of,
    ceil_div,
    next_power_of_2,
    shared_limit,
)

FEW_TOKENS = 8  # up to here experts are hardly shared, and sorting costs more than it saves
NOTHING = -1


@dataclass(frozen=True, slots=True)
class GroupedSettings:
    """Slots, outputs and inputs of a block of a grouped product."""

    block_slots: int
    block_outputs: int
    block_inputs: int
    num_warps: int
    num_stages: int


def settings(
    architecture: Architecture,
    *,
    num_slots: int,
    num_experts: int,
    element_size: int,
    products: int,
    batch_invariant: bool = False,
) -> GroupedSettings:
    """From shapes alone. `products`: weight tiles a block reads at once (two for gate and up).

    `batch_invariant`: from the model's shape alone.
    """
    if element_size > 2:  # float32 is for checking, not for speed
        return GroupedSettings(16, 32, 32, 4, 2)
    slots = 16
    while slots < 128 and slots * num_experts < num_slots and not batch_invariant:
        slots *= 2
    outputs = 128 // products
    stages = 4 if shared_limit(architecture.capability) > 150_000 else 3
    return GroupedSettings(slots, outputs, 64, 8 if slots >= 64 else 4, stages)


@triton.jit(do_not_specialize=["stride"])
def _route(
    logits,
    weights,
    experts,
    stride,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < NUM_EXPERTS
    values = tl.load(logits + token * stride + index, mask=inside, other=float("-inf")).to(tl.float32)
    powers = tl.exp(values - tl.max(values, 0))
    powers = tl.where(inside, powers / tl.sum(powers, 0), -1.0)
    places = tl.arange(0, BLOCK_K)
    chosen_weights = tl.zeros([BLOCK_K], tl.float32)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for place in range(TOP_K):
        largest = tl.max(powers, 0)
        # Of NaNs none is the largest: an expert that there is, or other memory would be read.
        expert = tl.minimum(tl.min(tl.where(powers == largest, index, BLOCK), 0), NUM_EXPERTS - 1)
        chosen_weights = tl.where(places == place, largest, chosen_weights)
        chosen = tl.where(places == place, expert, chosen)
        powers = tl.where(index == expert, -1.0, powers)
    if NORMALIZE:
        chosen_weights /= tl.sum(chosen_weights, 0)
    tl.store(weights + token * TOP_K + places, chosen_weights, mask=places < TOP_K)
    tl.store(experts + token * TOP_K + places, chosen, mask=places < TOP_K)


@triton.jit
def _few_gate_up(
    x,
    experts,
    gate_up,
    inner,
    x_stride,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """One slot's inner activations [SIZE], a block of them."""
    slot = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    expert = tl.load(experts + slot).to(tl.int64)
    row = x + (slot // TOP_K) * x_stride
    gates = gate_up + expert * (2 * SIZE * H) + outputs[:, None].to(tl.int64) * H
    gate = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], tl.float32)
    up = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], tl.float32)
    for start in range(0, H, BLOCK_INPUTS):
        inputs = start + tl.arange(0, BLOCK_INPUTS)
        inside = (outputs < SIZE)[:, None] & (inputs < H)[None, :]
        values = tl.load(row + inputs, mask=inputs < H, other=0.0).to(tl.float32)[None, :]
        gate += values * tl.load(gates + inputs[None, :], mask=inside, other=0.0).to(tl.float32)
        up += values * tl.load(gates + SIZE * H + inputs[None, :], mask=inside, other=0.0).to(tl.float32)
    gate_sum, up_sum = tl.sum(gate, 1), tl.sum(up, 1)
    result = gate_sum / (1.0 + tl.exp(-gate_sum)) * up_sum
    tl.store(inner + slot * SIZE + outputs, result.to(inner.dtype.element_ty), mask=outputs < SIZE)


@triton.jit
def _few_down(
    inner,
    weights,
    experts,
    down,
    out,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """One token's weighted sum over its experts, a block of outputs."""
    token = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    total = tl.zeros([BLOCK_OUTPUTS], tl.float32)
    for chosen in range(TOP_K):
        slot = token * TOP_K + chosen
        expert = tl.load(experts + slot).to(tl.int64)
        rows = down + expert * (H * SIZE) + outputs[:, None].to(tl.int64) * SIZE
        partial = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], tl.float32)
        for start in range(0, SIZE, BLOCK_INPUTS):
            inputs = start + tl.arange(0, BLOCK_INPUTS)
            inside = (outputs < H)[:, None] & (inputs < SIZE)[None, :]
            values = tl.load(inner + slot * SIZE + inputs, mask=inputs < SIZE, other=0.0).to(tl.float32)[None, :]
            partial += values * tl.load(rows + inputs[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights + slot) * tl.sum(partial, 1)
    tl.store(out + token * H + outputs, total.to(out.dtype.element_ty), mask=outputs < H)


@triton.jit(do_not_specialize=["num_slots"])
def _rank(experts, counts, ranks, num_slots, BLOCK: tl.constexpr):
    """Each slot's place among those of its expert, in any order, and how many each expert has."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < num_slots
    expert = tl.load(experts + slots, mask=inside, other=0)
    rank = tl.atomic_add(counts + expert, tl.full([BLOCK], 1, tl.int32), mask=inside, sem="relaxed")
    tl.store(ranks + slots, rank, mask=inside)


@triton.jit(do_not_specialize=["num_blocks"])
def _lay_out(
    counts,
    first_blocks,
    block_experts,
    num_blocks,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each expert's first block, and each block's expert (NOTHING past the last)."""
    index = tl.arange(0, BLOCK_EXPERTS)
    count = tl.load(counts + index, mask=index < NUM_EXPERTS, other=0)
    blocks = (count + BLOCK_SLOTS - 1) // BLOCK_SLOTS
    ends = tl.cumsum(blocks, 0)
    tl.store(first_blocks + index, ends - blocks, mask=index < NUM_EXPERTS)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        expert = tl.sum((ends[None, :] <= block[:, None]).to(tl.int32), 1)
        expert = tl.where(expert < NUM_EXPERTS, expert, -1)
        tl.store(block_experts + block, expert, mask=block < num_blocks)


@triton.jit(do_not_specialize=["num_slots"])
def _scatter(experts, ranks, first_blocks, ordered, num_slots, BLOCK_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Each slot to its place in the blocks of its expert."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < num_slots
    expert = tl.load(experts + slots, mask=inside, other=0)
    first = tl.load(first_blocks + expert, mask=inside, other=0)
    place = first * BLOCK_SLOTS + tl.load(ranks + slots, mask=inside, other=0)
    tl.store(ordered + place, slots, mask=inside)


@triton.jit
def _grouped_gate_up(
    x,
    ordered,
    block_experts,
    gate_up,
    inner,
    x_stride,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Inner activations of a block of slots of one expert."""
    block = tl.program_id(1)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert < 0:
        return
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    slots = tl.load(ordered + block * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)).to(tl.int64)
    there = slots >= 0
    rows = x + (tl.where(there, slots, 0) // TOP_K)[:, None] * x_stride
    columns = gate_up + expert * (2 * SIZE * H) + outputs[None, :].to(tl.int64) * H
    gate = tl.zeros([BLOCK_SLOTS, BLOCK_OUTPUTS], tl.float32)
    up = tl.zeros([BLOCK_SLOTS, BLOCK_OUTPUTS], tl.float32)
    for start in range(0, H, BLOCK_INPUTS):
        inputs = start + tl.arange(0, BLOCK_INPUTS)
        values = tl.load(rows + inputs[None, :], mask=there[:, None] & (inputs < H)[None, :], other=0.0)
        inside = (inputs < H)[:, None] & (outputs < SIZE)[None, :]
        gates = tl.load(columns + inputs[:, None], mask=inside, other=0.0)
        gate = tl.dot(values, gates, gate, input_precision="ieee")
        ups = tl.load(columns + SIZE * H + inputs[:, None], mask=inside, other=0.0)
        up = tl.dot(values, ups, up, input_precision="ieee")
    result = gate / (1.0 + tl.exp(-gate)) * up
    targets = inner + tl.where(there, slots, 0)[:, None] * SIZE + outputs[None, :]
    tl.store(targets, result.to(inner.dtype.element_ty), mask=there[:, None] & (outputs < SIZE)[None, :])


@triton.jit
def _grouped_down(
    inner,
    weights,
    ordered,
    block_experts,
    down,
    parts,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Weighted outputs, float32, of a block of slots of one expert."""
    block = tl.program_id(1)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert < 0:
        return
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    slots = tl.load(ordered + block * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)).to(tl.int64)
    there = slots >= 0
    slots = tl.where(there, slots, 0)
    columns = down + expert * (H * SIZE) + outputs[None, :].to(tl.int64) * SIZE
    total = tl.zeros([BLOCK_SLOTS, BLOCK_OUTPUTS], tl.float32)
    for start in range(0, SIZE, BLOCK_INPUTS):
        inputs = start + tl.arange(0, BLOCK_INPUTS)
        rows = inner + slots[:, None] * SIZE + inputs[None, :]
        values = tl.load(rows, mask=there[:, None] & (inputs < SIZE)[None, :], other=0.0)
        inside = (inputs < SIZE)[:, None] & (outputs < H)[None, :]
        downs = tl.load(columns + inputs[:, None], mask=inside, other=0.0)
        total = tl.dot(values, downs, total, input_precision="ieee")
    total *= tl.load(weights + slots, mask=there, other=0.0)[:, None]
    tl.store(parts + slots[:, None] * H + outputs[None, :], total, mask=there[:, None] & (outputs < H)[None, :])


@triton.jit
def _sum_parts(parts, out, H: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """A token's outputs: the sum over its slots, in their order."""
    token = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for chosen in range(TOP_K):
        total += tl.load(parts + (token * TOP_K + chosen) * H + outputs, mask=outputs < H, other=0.0)
    tl.store(out + token * H + outputs, total.to(out.dtype.element_ty), mask=outputs < H)


def route_launch(logits: torch.Tensor, top_k: int, *, normalize: bool) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch and what it fills: weights, experts."""
    num_tokens, num_experts = logits.shape
    assert logits.stride(1) == 1
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    block = next_power_of_2(num_experts)
    launch = Launch(
        _route,
        (num_tokens,),
        (logits, weights, experts, logits.stride(0)),
        {
            "NUM_EXPERTS": num_experts,
            "TOP_K": top_k,
            "NORMALIZE": normalize,
            "BLOCK": block,
            "BLOCK_K": next_power_of_2(top_k),
            "num_warps": 1 if block <= 256 else 4,
            "num_stages": 1,
        },
    )
    return launch, weights, experts


def route(logits: torch.Tensor, top_k: int, *, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `aiexport_edge.kernels.moe.route_reference`."""
    launch, weights, experts = route_launch(logits, top_k, normalize=normalize)
    launch.run()
    return weights, experts


def _few_launches(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    out: torch.Tensor,
) -> list[Launch]:
    num_tokens, hidden = x.shape
    top_k, size = experts.shape[1], down.shape[2]
    inner = torch.empty((num_tokens * top_k, size), dtype=x.dtype, device=x.device)
    few = {"H": hidden, "SIZE": size, "TOP_K": top_k, "num_warps": 4, "num_stages": 3}
    first = {"BLOCK_OUTPUTS": 8, "BLOCK_INPUTS": 256}
    second = {"BLOCK_OUTPUTS": 16, "BLOCK_INPUTS": 256}
    return [
        Launch(
            _few_gate_up,
            (num_tokens * top_k, ceil_div(size, first["BLOCK_OUTPUTS"])),
            (x, experts, gate_up, inner, x.stride(0)),
            few | first,
        ),
        Launch(
            _few_down,
            (num_tokens, ceil_div(hidden, second["BLOCK_OUTPUTS"])),
            (inner, weights, experts, down, out),
            few | second,
        ),
    ]


def sort_launches(
    experts: torch.Tensor, num_experts: int, block_slots: int
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The launches that put the slots of `experts` [T, k] in order, and what they fill: int32 `ordered` [blocks *
    block_slots], slots or NOTHING, and `block_experts` [blocks], of each block its expert or -1.
    """
    num_slots, device = experts.numel(), experts.device
    # Each expert that has slots wastes less than a block.
    num_blocks = num_slots // block_slots + min(num_experts, num_slots)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
    ranks = torch.empty(num_slots, dtype=torch.int32, device=device)
    first_blocks = torch.empty(num_experts, dtype=torch.int32, device=device)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=device)
    ordered = torch.full((num_blocks * block_slots,), NOTHING, dtype=torch.int32, device=device)
    small = {"BLOCK": 256, "num_warps": 4, "num_stages": 1}
    launches = [
        Launch(_rank, (ceil_div(num_slots, 256),), (experts, counts, ranks, num_slots), small),
        Launch(
            _lay_out,
            (1,),
            (counts, first_blocks, block_experts, num_blocks),
            {
                "NUM_EXPERTS": num_experts,
                "BLOCK_SLOTS": block_slots,
                "BLOCK_EXPERTS": next_power_of_2(num_experts),
                "BLOCK": max(1, min(64, 8192 // next_power_of_2(num_experts))),
                "num_warps": 4,
                "num_stages": 1,
            },
        ),
        Launch(
            _scatter,
            (ceil_div(num_slots, 256),),
            (experts, ranks, first_blocks, ordered, num_slots),
            small | {"BLOCK_SLOTS": block_slots},
        ),
    ]
    return launches, ordered, block_experts


def sum_launch(parts: torch.Tensor, out: torch.Tensor, top_k: int) -> Launch:
    """The launch that adds up each token's slots: parts [T * k, H] float32 to out [T, H]."""
    num_tokens, hidden = out.shape
    return Launch(
        _sum_parts,
        (num_tokens, ceil_div(hidden, 1024)),
        (parts, out),
        {"H": hidden, "TOP_K": top_k, "BLOCK": 1024, "num_warps": 4, "num_stages": 1},
    )


def _grouped_launches(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    out: torch.Tensor,
    architecture: Architecture,
    *,
    batch_invariant: bool,
) -> list[Launch]:
    num_tokens, hidden = x.shape
    num_experts, _, size = down.shape
    top_k = experts.shape[1]
    num_slots = num_tokens * top_k
    device = x.device

    def settings_of(products: int) -> GroupedSettings:
        return settings(
            architecture,
            num_slots=num_slots,
            num_experts=num_experts,
            element_size=x.element_size(),
            products=products,
            batch_invariant=batch_invariant,
        )

    first, second = settings_of(2), settings_of(1)
    assert first.block_slots == second.block_slots
    sort, ordered, block_experts = sort_launches(experts, num_experts, first.block_slots)
    num_blocks = block_experts.shape[0]
    inner = torch.empty((num_slots, size), dtype=x.dtype, device=device)
    parts = torch.empty((num_slots, hidden), dtype=torch.float32, device=device)

    def product(setting: GroupedSettings) -> dict[str, int]:
        return {
            "H": hidden,
            "SIZE": size,
            "BLOCK_SLOTS": setting.block_slots,
            "BLOCK_OUTPUTS": setting.block_outputs,
            "BLOCK_INPUTS": setting.block_inputs,
            "num_warps": setting.num_warps,
            "num_stages": setting.num_stages,
        }

    return [
        *sort,
        Launch(
            _grouped_gate_up,
            (ceil_div(size, first.block_outputs), num_blocks),
            (x, ordered, block_experts, gate_up, inner, x.stride(0)),
            product(first) | {"TOP_K": top_k},
        ),
        Launch(
            _grouped_down,
            (ceil_div(hidden, second.block_outputs), num_blocks),
            (inner, weights, ordered, block_experts, down, parts),
            product(second),
        ),
        sum_launch(parts, out, top_k),
    ]


def moe_mlp_launches(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    batch_invariant: bool = False,
    architecture: Architecture | None = None,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches, in order, and the tensor that they fill."""
    assert x.stride(1) == 1
    assert gate_up.is_contiguous()
    assert down.is_contiguous()
    assert weights.is_contiguous()
    assert experts.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0] <= FEW_TOKENS and not batch_invariant:
        return _few_launches(x, weights, experts, gate_up, down, out), out
    launches = _grouped_launches(
        x,
        weights,
        experts,
        gate_up,
        down,
        out,
        architecture or architecture_of(x.device),
        batch_invariant=batch_invariant,
    )
    return launches, out


def moe_mlp(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    batch_invariant: bool = False,
    architecture: Architecture | None = None,
) -> torch.Tensor:
    """See `aiexport_edge.kernels.moe.moe_mlp_reference`."""
    launches, out = moe_mlp_launches(
        x, weights, experts, gate_up, down, batch_invariant=batch_invariant, architecture=architecture
    )
    for launch in launches:
        launch.run()
    return out
