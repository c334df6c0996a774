"""Low-rank adapters on a GPU. What they compute is in `aiexport_edge.kernels.lora`.

Two launches: shrink, x by the first factors of all parts of a fused product, and expand, by the second factors onto the
output. Few tokens: a program takes one token. Many: a tile of tokens, and for each adapter that occurs in it the tile's
rows by that adapter, which for prompts is one or two. Nothing is sorted, the grid depends on shapes alone, and programs
without an adapter or past its rank return: a graph can hold them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.launch import Launch, ceil_div

if TYPE_CHECKING:
    from aiexport_edge.kernels.lora import LoraTable

FEW_TOKENS = 32
MOST_PARTS = 3
BLOCK_RANK = 16


@triton.jit
def _shrink_token(
    x,
    slots,
    ranks,
    a,
    inner,
    x_stride,
    K: tl.constexpr,
    MAX_RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token's low-rank activations of one part, a block of its ranks."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    part = tl.program_id(1) // (MAX_RANK // BLOCK_RANK)
    first = tl.program_id(1) % (MAX_RANK // BLOCK_RANK) * BLOCK_RANK
    if first >= tl.load(ranks + slot):
        return
    rows = first + tl.arange(0, BLOCK_RANK)
    factors = a + ((slot * NUM_PARTS + part) * MAX_RANK + rows)[:, None] * K
    total = tl.zeros([BLOCK_RANK, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        inputs = start + tl.arange(0, BLOCK_K)
        inside = inputs < K
        values = tl.load(x + token * x_stride + inputs, mask=inside, other=0.0).to(tl.float32)
        total += values[None, :] * tl.load(factors + inputs[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    tl.store(inner + (token * NUM_PARTS + part) * MAX_RANK + rows, tl.sum(total, 1))


@triton.jit
def _columns(
    block,
    FIRST_1: tl.constexpr,
    FIRST_2: tl.constexpr,
    START_1: tl.constexpr,
    START_2: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block's part, its columns, and where the part ends. No block has columns of two parts."""
    part = (block >= FIRST_1).to(tl.int32) + (block >= FIRST_2).to(tl.int32)
    start = tl.where(part == 0, 0, tl.where(part == 1, START_1, START_2))
    end = tl.where(part == 0, START_1, tl.where(part == 1, START_2, N))
    first = tl.where(part == 0, 0, tl.where(part == 1, FIRST_1, FIRST_2))
    return part, start + (block - first) * BLOCK_N + tl.arange(0, BLOCK_N), end


@triton.jit
def _expand_token(
    out,
    inner,
    slots,
    ranks,
    b,
    out_stride,
    N: tl.constexpr,
    MAX_RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    FIRST_1: tl.constexpr,
    FIRST_2: tl.constexpr,
    START_1: tl.constexpr,
    START_2: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of one token's outputs."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    rank = tl.load(ranks + slot)
    part, columns, end = _columns(tl.program_id(1), FIRST_1, FIRST_2, START_1, START_2, N, BLOCK_N)
    inside = columns < end
    low = inner + (token * NUM_PARTS + part) * MAX_RANK
    added = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        rows = first + tl.arange(0, BLOCK_RANK)
        factors = b + (slot * MAX_RANK + rows)[:, None] * N + columns[None, :]
        values = tl.load(low + rows)
        added += tl.sum(values[:, None] * tl.load(factors, mask=inside[None, :], other=0.0).to(tl.float32), 0)
    place = out + token * out_stride + columns
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32) + added
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _shrink_tile(
    x,
    slots,
    ranks,
    a,
    inner,
    x_stride,
    num_tokens,
    K: tl.constexpr,
    MAX_RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of tokens' low-rank activations of one part, a block of their ranks."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = tokens < num_tokens
    part = tl.program_id(1) // (MAX_RANK // BLOCK_RANK)
    first = tl.program_id(1) % (MAX_RANK // BLOCK_RANK) * BLOCK_RANK
    rows = first + tl.arange(0, BLOCK_RANK)
    own = tl.load(slots + tokens, mask=there, other=-1)
    inputs_of = x + tokens.to(tl.int64)[:, None] * x_stride
    total = tl.zeros([BLOCK_T, BLOCK_RANK], tl.float32)
    slot = tl.max(own, 0)
    while slot >= 0:
        mine = own == slot
        if first < tl.load(ranks + slot):
            factors = a + ((slot.to(tl.int64) * NUM_PARTS + part) * MAX_RANK + rows)[None, :] * K
            product = tl.zeros([BLOCK_T, BLOCK_RANK], tl.float32)
            for start in range(0, K, BLOCK_K):
                inputs = start + tl.arange(0, BLOCK_K)
                inside = inputs < K
                values = tl.load(inputs_of + inputs[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
                weights = tl.load(factors + inputs[:, None], mask=inside[:, None], other=0.0)
                product = tl.dot(values, weights, product, input_precision="ieee")
            total = tl.where(mine[:, None], product, total)  # others' rows: 0 * NaN of a broken adapter is no 0
        own = tl.where(mine, -1, own)
        slot = tl.max(own, 0)
    places = inner + (tokens.to(tl.int64)[:, None] * NUM_PARTS + part) * MAX_RANK + rows[None, :]
    tl.store(places, total, mask=there[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _expand_tile(
    out,
    inner,
    slots,
    ranks,
    b,
    out_stride,
    num_tokens,
    N: tl.constexpr,
    MAX_RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    FIRST_1: tl.constexpr,
    FIRST_2: tl.constexpr,
    START_1: tl.constexpr,
    START_2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of outputs of a tile of tokens."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = tokens < num_tokens
    own = tl.load(slots + tokens, mask=there, other=-1)
    slot = tl.max(own, 0)
    if slot < 0:
        return
    touched = own >= 0
    part, columns, end = _columns(tl.program_id(1), FIRST_1, FIRST_2, START_1, START_2, N, BLOCK_N)
    inside = columns < end
    low = inner + (tokens.to(tl.int64)[:, None] * NUM_PARTS + part) * MAX_RANK
    places = out + tokens.to(tl.int64)[:, None] * out_stride + columns[None, :]
    added = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    while slot >= 0:
        mine = own == slot
        product = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for first in range(0, tl.load(ranks + slot), BLOCK_RANK):
            rows = first + tl.arange(0, BLOCK_RANK)
            factors = b + (slot.to(tl.int64) * MAX_RANK + rows)[:, None] * N + columns[None, :]
            weights = tl.load(factors, mask=inside[None, :], other=0.0)
            values = tl.load(low + rows[None, :], mask=mine[:, None], other=0.0).to(weights.dtype)
            product = tl.dot(values, weights, product, input_precision="ieee")
        added = tl.where(mine[:, None], product, added)
        own = tl.where(mine, -1, own)
        slot = tl.max(own, 0)
    total = tl.load(places, mask=touched[:, None] & inside[None, :], other=0.0).to(tl.float32) + added
    tl.store(places, total.to(out.dtype.element_ty), mask=touched[:, None] & inside[None, :])


def add_lora_launches(
    out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, table: LoraTable, *, batch_invariant: bool = False
) -> list[Launch]:
    """The launches, in order. They change `out`. `batch_invariant`: the same one for any number of tokens."""
    num_tokens, out_features = out.shape
    _, num_parts, max_rank, in_features = table.a.shape
    assert num_parts <= MOST_PARTS
    assert max_rank % BLOCK_RANK == 0
    assert out.stride(1) == x.stride(1) == 1
    assert table.a.is_contiguous()
    assert table.b.is_contiguous()
    inner = torch.empty((num_tokens, num_parts, max_rank), dtype=torch.float32, device=x.device)
    few = num_tokens <= FEW_TOKENS and not batch_invariant
    block_n = 128 if few else 64
    starts = (0, *table.ends[:-1], *[out_features] * (MOST_PARTS - num_parts))
    sizes = [end - start for start, end in zip(starts, (*starts[1:], out_features), strict=True)]
    blocks = [ceil_div(size, block_n) for size in sizes]
    shared = {"MAX_RANK": max_rank, "NUM_PARTS": num_parts, "BLOCK_RANK": BLOCK_RANK, "num_warps": 4}
    shrink = shared | {"K": in_features, "num_stages": 3}
    expand = shared | {
        "N": out_features,
        "FIRST_1": blocks[0],
        "FIRST_2": blocks[0] + blocks[1],
        "START_1": starts[1],
        "START_2": starts[2],
        "BLOCK_N": block_n,
        "num_stages": 2,
    }
    rank_blocks, column_blocks = num_parts * max_rank // BLOCK_RANK, sum(blocks)
    inputs = (x, slots, table.ranks, table.a, inner, x.stride(0))
    outputs = (out, inner, slots, table.ranks, table.b, out.stride(0))
    if few:
        return [
            Launch(_shrink_token, (num_tokens, rank_blocks), inputs, shrink | {"BLOCK_K": 256}),
            Launch(_expand_token, (num_tokens, column_blocks), outputs, expand),
        ]
    block_t = 64 if not batch_invariant and num_tokens > 256 and x.element_size() == 2 else 16
    tiles = ceil_div(num_tokens, block_t)
    tile = {"BLOCK_T": block_t}
    return [
        Launch(_shrink_tile, (tiles, rank_blocks), (*inputs, num_tokens), shrink | tile | {"BLOCK_K": 64}),
        Launch(_expand_tile, (tiles, column_blocks), (*outputs, num_tokens), expand | tile),
    ]


def add_lora(
    out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, table: LoraTable, *, batch_invariant: bool = False
) -> None:
    """See `aiexport_edge.kernels.lora.add_lora_reference`."""
    for launch in add_lora_launches(out, x, slots, table, batch_invariant=batch_invariant):
        launch.run()
