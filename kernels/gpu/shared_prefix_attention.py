"""Decode attention where sequences share their first pages: those keys are read once for all of them (cascade).

What it computes is in `aiexport_edge.kernels.shared_prefix_attention`. One launch attends the shared keys for the
stacked queries of a group, one attends each sequence's own keys, one merges the states (L. Zheng et al., "SGLang";
Z. Ye et al., "Cascade inference", 2024).

    group of 3 sequences:  | shared pages: rows of all three together | own pages: a sequence each |  -> merged
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.attention_tiles import (
    BETWEEN,
    attend_tile,
    merge_states_launch,
    owner_of_block,
    padded_head_dim,
    score_factor,
)
from aiexport_edge.kernels.gpu.decode_attention import (
    FEWEST_SPLIT_TOKENS,
    MOST_SPLITS,
    decode_launch,
    plan_splits_launch,
    settings_for,
)
from aiexport_edge.kernels.gpu.elementwise import E4M3_DECODED_SCALE
from aiexport_edge.kernels.gpu.launch import Architecture, Launch, architecture_of, ceil_div
from aiexport_edge.kernels.gpu.paged_attention import settings as prefill_settings

MEMBERS_AT_ONCE = 256


@triton.jit(do_not_specialize=["max_splits"], do_not_specialize_on_alignment=["group_start_loc", "prefix_lens"])
def _plan_prefixes(
    group_start_loc,
    prefix_lens,
    first_positions,
    prefix_splits,
    max_splits,
    TILE: tl.constexpr,
    FEWEST_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each member of a group: where its own keys begin, and into how many parts the shared ones are cut."""
    group = tl.program_id(0)
    start = tl.load(group_start_loc + group)
    end = tl.load(group_start_loc + group + 1)
    length = tl.load(prefix_lens + group)
    tiles = tl.cdiv(length, TILE)
    splits = tl.minimum(tl.cdiv(tiles, FEWEST_TILES), max_splits)
    for base in range(start, end, BLOCK):
        members = base + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], tl.int32)
        tl.store(first_positions + members, zeros + length, mask=members < end)
        tl.store(prefix_splits + members, zeros + splits, mask=members < end)


@triton.jit(
    do_not_specialize=["num_groups", "table_stride", "num_states"],
    do_not_specialize_on_alignment=["block_tables", "group_start_loc", "prefix_lens"],
)
def _shared_prefix_attention(
    q,
    k_cache,
    v_cache,
    block_tables,
    group_start_loc,
    prefix_lens,
    prefix_splits,
    k_scale,
    v_scale,
    states,
    logs,
    factor,
    num_groups,
    q_token_stride,
    q_head_stride,
    table_stride,
    num_states,
    k_page_stride,
    k_head_stride,
    k_token_stride,
    v_page_stride,
    v_head_stride,
    v_token_stride,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    TOKENS_PER_PAGE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    DECODED_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """One split of a group's shared keys for some of its sequences' heads of one KV head."""
    GROUP: tl.constexpr = HQ // HKV
    MEMBERS: tl.constexpr = BLOCK_ROWS // GROUP
    kv_head = tl.program_id(0)
    block = tl.program_id(1)
    split = tl.program_id(2)
    group = owner_of_block(group_start_loc, num_groups, block, MEMBERS)
    start = tl.load(group_start_loc + group)
    size = tl.load(group_start_loc + group + 1) - start
    first_member = (block - (start // MEMBERS + group)) * MEMBERS
    if first_member >= size:
        return
    length = tl.load(prefix_lens + group)
    splits = tl.load(prefix_splits + start)
    if split >= splits:
        return
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_D)
    members = first_member + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_inside = (rows < MEMBERS * GROUP) & (members < size)
    inside = row_inside[:, None] & (dims < D)[None, :]
    sequences = (start + members).to(tl.int64)
    queries = tl.load(
        q + sequences[:, None] * q_token_stride + heads[:, None] * q_head_stride + dims[None, :], mask=inside, other=0.0
    )
    end_tile = tl.cdiv(length, TILE)
    per_split = tl.cdiv(end_tile, splits)
    begin = split * per_split
    end = tl.minimum(begin + per_split, end_tile)
    k_head = k_cache + kv_head.to(tl.int64) * k_head_stride
    v_head = v_cache + kv_head.to(tl.int64) * v_head_stride
    if QUANTIZED:
        factor *= tl.load(k_scale + kv_head)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_ROWS], tl.float32)
    attended = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for tile in range(begin, end):
        highest, denominator, attended = attend_tile(
            queries,
            highest,
            denominator,
            attended,
            tile,
            0,
            length,
            rows,
            factor,
            k_head,
            v_head,
            block_tables + start.to(tl.int64) * table_stride,
            k_page_stride,
            k_token_stride,
            v_page_stride,
            v_token_stride,
            BETWEEN,
            0,
            D,
            TOKENS_PER_PAGE,
            BLOCK_D,
            TILE,
            QUANTIZED,
        )
    empty = denominator == 0.0
    attended = attended / tl.where(empty, 1.0, denominator)[:, None]
    if QUANTIZED:
        attended *= tl.load(v_scale + kv_head) * DECODED_SCALE
    state = (sequences * HQ + heads) * num_states + split
    log = tl.where(empty, float("-inf"), highest + tl.log2(tl.where(empty, 1.0, denominator)))
    tl.store(logs + state, log, mask=row_inside)
    tl.store(states + state[:, None] * D + dims[None, :], attended, mask=inside)


def shared_prefix_attention_launches(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    group_start_loc: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    architecture: Architecture | None = None,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches, in order, and the tensor that they fill."""
    architecture = architecture or architecture_of(q.device)
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, tokens_per_page = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    num_groups = prefix_lens.shape[0]
    max_context = block_tables.shape[1] * tokens_per_page
    own = settings_for(q, k_cache, block_tables, architecture=architecture)
    shared = prefill_settings(
        architecture,
        num_tokens=batch,
        num_sequences=num_groups,
        group=group,
        head_dim=head_dim,
        element_size=q.element_size(),
    )
    num_blocks = batch // (shared.block_rows // group) + num_groups
    busy = ceil_div(own.programs, num_kv_heads * ceil_div(batch * group, shared.block_rows))
    prefix_states = max(1, min(busy, MOST_SPLITS, ceil_div(max_context, FEWEST_SPLIT_TOKENS)))
    own = dataclasses.replace(own, max_splits=min(own.max_splits, MOST_SPLITS))
    num_states = prefix_states + own.max_splits

    device = q.device
    first_positions = torch.empty(batch, dtype=torch.int32, device=device)
    prefix_splits = torch.empty(batch, dtype=torch.int32, device=device)
    out = torch.empty((batch, num_q_heads, head_dim), dtype=q.dtype, device=device)
    states = torch.empty((batch, num_q_heads, num_states, head_dim), dtype=torch.float32, device=device)
    logs = torch.empty((batch, num_q_heads, num_states), dtype=torch.float32, device=device)

    plan_prefixes = Launch(
        _plan_prefixes,
        (num_groups,),
        (group_start_loc, prefix_lens, first_positions, prefix_splits, prefix_states),
        {
            "TILE": shared.tile,
            "FEWEST_TILES": max(1, FEWEST_SPLIT_TOKENS // shared.tile),
            "BLOCK": MEMBERS_AT_ONCE,
            "num_warps": 4,
            "num_stages": 1,
        },
    )
    plan_own, num_splits = plan_splits_launch(
        seq_lens, own, num_kv_heads=num_kv_heads, sliding_window=0, first_positions=first_positions
    )
    attend_own = decode_launch(
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        num_splits,
        out,
        states,
        logs,
        own,
        scale=scale,
        sliding_window=0,
        k_scale=k_scale,
        v_scale=v_scale,
        first_positions=first_positions,
        num_prefix_states=prefix_states,
    )
    quantized = k_scale is not None
    if quantized:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    attend_shared = Launch(
        _shared_prefix_attention,
        (num_kv_heads, num_blocks, prefix_states),
        (
            q,
            k_cache,
            v_cache,
            block_tables,
            group_start_loc,
            prefix_lens,
            prefix_splits,
            logs if k_scale is None else k_scale,
            logs if v_scale is None else v_scale,
            states,
            logs,
            score_factor(scale, quantized=quantized),
            num_groups,
            q.stride(0),
            q.stride(1),
            block_tables.stride(0),
            num_states,
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
        ),
        {
            "HQ": num_q_heads,
            "HKV": num_kv_heads,
            "D": head_dim,
            "TOKENS_PER_PAGE": tokens_per_page,
            "QUANTIZED": quantized,
            "DECODED_SCALE": E4M3_DECODED_SCALE,
            "BLOCK_ROWS": shared.block_rows,
            "BLOCK_D": padded_head_dim(head_dim),
            "TILE": shared.tile,
            "num_warps": shared.num_warps,
            "num_stages": shared.num_stages,
        },
    )
    merge = merge_states_launch(states, logs, prefix_splits, num_splits, out, num_prefix_states=prefix_states)
    return [plan_prefixes, plan_own, attend_shared, attend_own, merge], out


def shared_prefix_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    group_start_loc: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    architecture: Architecture | None = None,
) -> torch.Tensor:
    """See `aiexport_edge.kernels.shared_prefix_attention.shared_prefix_attention_reference`."""
    launches, out = shared_prefix_attention_launches(
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        group_start_loc,
        prefix_lens,
        scale=scale,
        k_scale=k_scale,
        v_scale=v_scale,
        architecture=architecture,
    )
    for launch in launches:
        launch.run()
    return out
