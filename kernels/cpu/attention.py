"""Paged attention: how a batch is cut up, and the launches. What they do is in `attention_tiles.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aiexport_edge.kernels.cpu.attention_plan import (
    HEADER_SIZE,
    NANOSECONDS,
    NUM_MERGES,
    NUM_UNITS,
    RECORD_SIZE,
    SPLIT,
    plan_tiles,
)
from aiexport_edge.kernels.cpu.attention_rows import BLOCK, COLUMNS, state_size
from aiexport_edge.kernels.cpu.attention_tiles import IN_PLACE, PAIRS, WIDE, attend_tiles, merge_tiles
from aiexport_edge.kernels.cpu.dot import HAS_BFLOAT16
from aiexport_edge.kernels.cpu.units import DTYPES, KV_DTYPES
from aiexport_edge.kernels.threads import empty, float_bits, is_recording, launch, num_threads

TILE_ROWS = 64
FEW_ROWS = 4
LOG2_E = math.log2(math.e)
ASSUMED_NANOSECONDS = 20_000.0  # of a row, where its length is not known yet
UNITS_PER_THREAD = 4  # with fewer, long sequences are shared out by splits


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the attention of a batch is cut up (`attention_plan`): `records`, and its `header`, which is empty where the
    plan is made by a launch that was recorded and has not run.
    """

    records: torch.Tensor
    header: Sequence[int]


def plan_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sliding_window: int,
) -> AttentionPlan:
    """How the attention of such a batch is cut up: the same for all its layers with this window. Of `q` [rows, query
    heads, head_dim] the shape is wanted alone.
    """
    num_rows, num_q_heads, head_dim = q.shape
    _, num_kv_heads, tokens_per_page, _ = k_cache.shape
    assert block_tables.dtype == query_start_loc.dtype == seq_lens.dtype == torch.int32
    group = num_q_heads // num_kv_heads
    num_sequences = seq_lens.shape[0]
    most_splits = -(-block_tables.shape[1] * tokens_per_page // SPLIT)
    most_records = (num_sequences + num_rows // _tile_queries(group)) * max(1, most_splits)
    plan = empty((HEADER_SIZE + most_records * RECORD_SIZE,), torch.int64)
    launch(
        plan_tiles,
        1,
        0.0,
        0,
        plan.data_ptr(),
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_tables.data_ptr(),
        block_tables.stride(0),
        tokens_per_page,
        _most_shared(num_sequences, num_kv_heads, group, most_records),
        num_sequences,
        _tile_queries(group),
        sliding_window,
        group,
        num_kv_heads,
        head_dim,
        _min_units(),
    )
    return AttentionPlan(plan, [] if is_recording() else plan[:HEADER_SIZE].tolist())


def _way(q: torch.Tensor, k_cache: torch.Tensor, most_rows: int) -> int:
    """How to multiply: float32, bfloat16 pairs, or these where they lie, which has other bits and suits few rows, and
    decodes that share what they read no less than pairs.
    """
    if not HAS_BFLOAT16 or not q.dtype == k_cache.dtype == torch.bfloat16 or q.shape[2] % COLUMNS:
        return WIDE
    return IN_PLACE if most_rows <= FEW_ROWS else PAIRS


def _tile_queries(group: int) -> int:
    return max(1, TILE_ROWS // group)


def _may_split(num_sequences: int, num_kv_heads: int, most_records: int) -> bool:
    """Whether sequences may be cut by splits, whatever their lengths turn out to be."""
    return num_sequences * num_kv_heads < _min_units() and most_records > num_sequences


def _most_shared(num_sequences: int, num_kv_heads: int, group: int, most_records: int) -> int:
    """How many sequences may be one record: so many that the threads still have enough to share out."""
    if _may_split(num_sequences, num_kv_heads, most_records):
        return 1
    return max(1, min(num_sequences * num_kv_heads // max(1, _min_units()), num_sequences, _tile_queries(group)))


def most_state_bytes(num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """The most memory that the splits of a batch leave their states in, with contexts of `num_tokens`."""
    rows = max(TILE_ROWS, num_q_heads // num_kv_heads)
    units = (_min_units() + num_kv_heads) * -(-num_tokens // SPLIT)
    return units * rows * state_size(-(-head_dim // COLUMNS) * COLUMNS)


def _min_units() -> int:
    """With fewer, sequences are cut by splits."""
    return UNITS_PER_THREAD * num_threads() if num_threads() > 1 else 0


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    plan: AttentionPlan | None = None,
    batch_invariant: bool = True,
) -> torch.Tensor:
    """See `aiexport_edge.kernels.paged_attention.paged_attention_reference`. `plan` is `plan_attention`'s, if known.

    While launches are recorded, every sequence must have tokens, and every row must be in a sequence.
    """
    num_rows, num_q_heads, head_dim = q.shape
    _, num_kv_heads, tokens_per_page, _ = k_cache.shape
    assert block_tables.stride(1) == 1 or block_tables.shape[1] <= 1
    group = num_q_heads // num_kv_heads
    q = q.contiguous()
    out = empty(q.shape, q.dtype)
    if plan is None:
        plan = plan_attention(q, k_cache, block_tables, query_start_loc, seq_lens, sliding_window=sliding_window)
    records = plan.records
    most_records = (records.shape[0] - HEADER_SIZE) // RECORD_SIZE
    if not plan.header:  # what it will say is not known yet
        most_queries = min(_tile_queries(group), num_rows - seq_lens.shape[0] + 1)
        most_queries = max(most_queries, _most_shared(seq_lens.shape[0], num_kv_heads, group, most_records))
        by_split = int(_may_split(seq_lens.shape[0], num_kv_heads, most_records))
        num_records, nanoseconds = most_records, ASSUMED_NANOSECONDS * num_rows
    else:
        num_records, most_queries, zero_from, by_split, nanoseconds = plan.header[: NANOSECONDS + 1]
        if zero_from < num_rows:
            assert not is_recording()
            out[zero_from:].zero_()
        if num_records == 0:
            return out

    kv_bytes = k_cache.element_size()
    k_page, k_head, k_token, k_item = (kv_bytes * stride for stride in k_cache.stride())
    v_page, v_head, v_token, v_item = (kv_bytes * stride for stride in v_cache.stride())
    assert k_item == v_item == kv_bytes
    assert (k_scale is not None) == (v_scale is not None) == (kv_bytes == 1)
    v_scales = 0 if v_scale is None else v_scale.data_ptr()
    q_dtype, row_bytes = DTYPES[q.dtype], num_q_heads * head_dim * q.element_size()
    most_rows = most_queries * group
    width = -(-head_dim // COLUMNS) * COLUMNS
    state_bytes = state_size(width) * most_rows
    states = empty((state_bytes * num_records * num_kv_heads if by_split else 0,), torch.uint8)
    launch(
        attend_tiles,
        0,
        nanoseconds,
        4 * most_rows * (width + BLOCK) + 2 * state_bytes + 32 * BLOCK + 8 * BLOCK * width,
        records.data_ptr(),
        q.data_ptr(),
        out.data_ptr(),
        q_dtype,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        KV_DTYPES[k_cache.dtype],
        k_page,
        k_head,
        k_token,
        v_page,
        v_head,
        v_token,
        0 if k_scale is None else k_scale.data_ptr(),
        v_scales,
        block_tables.data_ptr(),
        block_tables.stride(0),
        seq_lens.data_ptr(),
        tokens_per_page,
        num_q_heads,
        num_kv_heads,
        head_dim,
        sliding_window,
        states.data_ptr(),
        state_bytes,
        row_bytes,
        _way(q, k_cache, group if num_rows == seq_lens.shape[0] and not batch_invariant else TILE_ROWS),
        float_bits(scale * LOG2_E),
        units_at=records.data_ptr() + 8 * NUM_UNITS,
    )
    if by_split:
        launch(
            merge_tiles,
            0,
            0.0,
            4 * width,
            records.data_ptr(),
            out.data_ptr(),
            q_dtype,
            num_q_heads,
            num_kv_heads,
            head_dim,
            states.data_ptr(),
            state_bytes,
            row_bytes,
            v_scales,
            units_at=records.data_ptr() + 8 * NUM_MERGES,
        )
    return out
