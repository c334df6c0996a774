"""Paged attention. A unit of work is a tile of queries of one sequence for one KV head, with all query heads of it.

    position   0 . . . . 63 | 64 . . . 127 | ...            blocks of 64 keys, anchored at position 0
    split      0 . . . . . . . . . . . . . . . . 2047 | ... softmax starts afresh at each split, splits merge in order

Keys and values of a block are read through the block table into float32 scratch, keys transposed, once for all rows of
the tile. Blocks and splits are places in the sequence, so neither chunking nor batch nor threads change a bit of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aiexport_edge.kernels.cpu.attention_pairs import (
    arrange_keys,
    arrange_query,
    ask_for,
    attend_block,
    attend_block_in_place,
    copy_words,
)
from aiexport_edge.kernels.cpu.attention_plan import (
    BY_SPLIT,
    END_SPLIT,
    FIRST_ROW,
    FIRST_SPLIT,
    HEADER_SIZE,
    MOST_QUERIES,
    NANOSECONDS,
    NUM_MERGES,
    NUM_QUERIES,
    NUM_RECORDS,
    NUM_UNITS,
    POSITION,
    RECORD_SIZE,
    SEQUENCE,
    SPLIT,
    plan_tiles,
)
from aiexport_edge.kernels.cpu.attention_rows import (
    BLOCK,
    COLUMNS,
    add_values,
    clear,
    finish,
    merge,
    score_rows,
    state_size,
    weigh,
)
from aiexport_edge.kernels.cpu.dot import HAS_BFLOAT16
from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.memory import (
    as_float,
    get_float32,
    get_int32,
    get_int64,
    load,
    narrow,
    set_int64,
    store,
    widen,
    widen_columns,
)
from aiexport_edge.kernels.cpu.simd import LANES, multiply, splat
from aiexport_edge.kernels.cpu.units import DTYPES, KV_DTYPES, begin, end, next_unit
from aiexport_edge.kernels.threads import empty, float_bits, is_recording, launch, num_threads

TILE_ROWS = 64
FEW_ROWS = 4
WIDE, PAIRS, IN_PLACE = range(3)
LOG2_E = math.log2(math.e)
ASSUMED_NANOSECONDS = 20_000.0  # of a row, where its length is not known yet
UNITS_PER_THREAD = 4  # with fewer, long sequences are shared out by splits


@inner
def _locate(
    cache: int,
    page_stride: int,
    token_stride: int,
    page_table: int,
    tokens_per_page: int,
    base: int,
    count: int,
    places: int,
) -> None:
    """Addresses of positions base .. base + count - 1 of one head; the last again up to 64."""
    page_index = base // tokens_per_page
    offset = base - page_index * tokens_per_page
    place = 0
    done = 0
    while done < count:
        page = cache + get_int32(page_table, page_index) * page_stride
        for i in range(offset, min(tokens_per_page, offset + count - done)):
            place = page + i * token_stride
            set_int64(places, done, place)
            done += 1
        page_index += 1
        offset = 0
    for i in range(count, BLOCK):
        set_int64(places, i, place)


@inner
def _attend_block(
    here: int,
    count: int,
    following: int,
    next_count: int,
    dtype: int,
    head_dim: int,
    queries: int,
    rows: int,
    group: int,
    high: int,
    window: int,
    pairs: int,
    factor: float,
    state: int,
    scratch: int,
) -> None:
    """One block for all rows of a tile; the first row sees keys below `high`. `pairs`: see `attention_pairs`.

    `here` and `following` hold the places of this block's and the next one's 64 keys, then of their values.
    """
    width = (head_dim + COLUMNS - 1) // COLUMNS * COLUMNS
    state_row = 4 * (width + 2 * LANES)
    row_bytes = head_dim * (4 if dtype == 0 else 2)
    scores, columns, wide_values = scratch, scratch + 4 * rows * BLOCK, scratch + 4 * (rows + width) * BLOCK
    if pairs == IN_PLACE:
        attend_block_in_place(
            here, count, following, next_count, head_dim, queries, rows, group, high, window, factor, state, scratch
        )
        return
    for key in range(0, count, LANES):
        # Memory is then read while this block is computed: 20 % less time where it does not come from a cache.
        ask_for(following, key, min(key + LANES, next_count), row_bytes)
        if pairs != 0:
            arrange_keys(here + 8 * key, head_dim, columns + 4 * key)
        else:
            widen_columns(dtype, here + 8 * key, columns + 4 * key, 4 * BLOCK, head_dim)
    if pairs != 0:
        attend_block(here, count, head_dim, queries, rows, group, high, window, factor, state, scratch)
        return
    for place in range(count):
        widen(dtype, get_int64(here, BLOCK + place), wide_values + 4 * place * width, head_dim)
    num_columns = (count + COLUMNS - 1) // COLUMNS * COLUMNS
    for column in range(0, num_columns, COLUMNS):
        right, out = columns + 4 * column, scores + 4 * column
        score_rows(queries, 4 * width, right, 4 * BLOCK, out, 4 * BLOCK, rows, head_dim)
    for row in range(rows):
        end = high + row // group
        low = end - window if window > 0 else 0
        weigh(scores + 4 * row * BLOCK, num_columns // LANES, low, end, state + row * state_row, width)
    for column in range(0, width, COLUMNS):
        right, out = wide_values + 4 * column, state + 4 * column
        add_values(scores, 4 * BLOCK, right, 4 * width, out, state_row, rows, count)


@inner
def _scale_of(scales: int, head: int) -> float:
    """What a head's codes are to be multiplied by; 1 where there are none."""
    if scales == 0:
        return 1.0
    return float(get_float32(scales, head))


@inner
def _finish_tile(
    state: int, rows: int, group: int, out: int, dtype: int, row_bytes: int, head_dim: int, scratch: int, scale: float
) -> None:
    """From the states of a tile's rows to the result, times `scale`; `out` is the first query's first head."""
    width = (head_dim + COLUMNS - 1) // COLUMNS * COLUMNS
    head_bytes = head_dim * (4 if dtype == 0 else 2)
    for row in range(rows):
        finish(state + row * 4 * (width + 2 * LANES), width, scratch)
        if scale != 1.0:
            for i in range(0, width, LANES):
                store(scratch + 4 * i, multiply(load(scratch + 4 * i), splat(np.float32(scale))))
        narrow(dtype, scratch, out + row // group * row_bytes + row % group * head_bytes, head_dim)


@kernel
def attend_tiles(
    control: int,
    scratch: int,
    num_units: int,
    plan: int,
    q: int,
    out: int,
    q_dtype: int,
    keys: int,
    values: int,
    kv_dtype: int,
    k_page: int,
    k_head: int,
    k_token: int,
    v_page: int,
    v_head: int,
    v_token: int,
    k_scales: int,
    v_scales: int,
    block_tables: int,
    tables_stride: int,
    tokens_per_page: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    states: int,
    state_bytes: int,
    row_bytes: int,
    pairs: int,
    scale_bits: int,
) -> None:
    """Every unit's attention to `out`, or in a plan by splits its state to record * num_kv_heads + head of `states`."""
    group = num_q_heads // num_kv_heads
    max_rows = get_int64(plan, MOST_QUERIES) * group
    by_split = get_int64(plan, BY_SPLIT)
    head_bytes = head_dim * (4 if q_dtype == 0 else 2)
    width = (head_dim + COLUMNS - 1) // COLUMNS * COLUMNS
    queries = scratch
    own_state = queries + 4 * max_rows * width
    next_split = own_state + state_bytes
    here = next_split + state_bytes
    following = here + 16 * BLOCK
    work_space = following + 16 * BLOCK
    scale = as_float(scale_bits)

    unit = begin(control)
    while unit < num_units:
        record, head = plan + 8 * (HEADER_SIZE + unit // num_kv_heads * RECORD_SIZE), unit % num_kv_heads
        first_head = head * group * head_bytes + get_int64(record, FIRST_ROW) * row_bytes
        position, rows = get_int64(record, POSITION), get_int64(record, NUM_QUERIES) * group
        stop = position + get_int64(record, NUM_QUERIES)
        page_table = block_tables + 4 * get_int64(record, SEQUENCE) * tables_stride
        head_keys, head_values = keys + head * k_head, values + head * v_head
        whole = states + unit * state_bytes if by_split else own_state
        factor = splat(np.float32(scale * _scale_of(k_scales, head)))

        for row in range(rows):
            place = queries + 4 * row * width
            source = q + first_head + row // group * row_bytes + row % group * head_bytes
            if pairs == IN_PLACE:
                copy_words(source, head_dim // 2, queries + 2 * row * head_dim)
                continue
            if pairs != 0:
                arrange_query(source, head_dim, queries, row, rows)
                continue
            widen(q_dtype, source, place, head_dim)
            for i in range(0, head_dim, LANES):
                store(place + 4 * i, multiply(load(place + 4 * i), factor))

        first_split = get_int64(record, FIRST_SPLIT)
        for split in range(first_split, get_int64(record, END_SPLIT)):
            state = whole if split == first_split else next_split
            clear(state, width, rows)
            start, end_key = split * SPLIT, min(stop, (split + 1) * SPLIT)
            if window > 0:
                start = max(start, (position - window + 1) // BLOCK * BLOCK)
            count = min(BLOCK, end_key - start)
            _locate(head_keys, k_page, k_token, page_table, tokens_per_page, start, count, here)
            _locate(head_values, v_page, v_token, page_table, tokens_per_page, start, count, here + 8 * BLOCK)
            for base in range(start, end_key, BLOCK):
                after = base + BLOCK
                next_count = max(0, min(BLOCK, end_key - after))
                if next_count > 0:
                    after_values = following + 8 * BLOCK
                    _locate(head_keys, k_page, k_token, page_table, tokens_per_page, after, next_count, following)
                    _locate(head_values, v_page, v_token, page_table, tokens_per_page, after, next_count, after_values)
                _attend_block(
                    here,
                    count,
                    following,
                    next_count,
                    kv_dtype,
                    head_dim,
                    queries,
                    rows,
                    group,
                    position + 1 - base,
                    window,
                    pairs,
                    scale,
                    state,
                    work_space,
                )
                here, following, count = following, here, next_count
            if state != whole:
                merge(whole, state, width, rows)

        if not by_split:
            own_scale = _scale_of(v_scales, head)
            _finish_tile(whole, rows, group, out + first_head, q_dtype, row_bytes, head_dim, work_space, own_scale)
        unit = next_unit(control)
    end(control)


@kernel
def merge_tiles(
    control: int,
    scratch: int,
    num_units: int,
    plan: int,
    out: int,
    q_dtype: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    states: int,
    state_bytes: int,
    row_bytes: int,
    v_scales: int,
) -> None:
    """The attention of each tile from the states of its splits, which stand one after the other in the plan."""
    group = num_q_heads // num_kv_heads
    width = (head_dim + COLUMNS - 1) // COLUMNS * COLUMNS
    head_bytes = head_dim * (4 if q_dtype == 0 else 2)
    unit = begin(control)
    while unit < num_units:
        number, head = unit // num_kv_heads, unit % num_kv_heads
        record = plan + 8 * (HEADER_SIZE + number * RECORD_SIZE)
        first_row, rows = get_int64(record, FIRST_ROW), get_int64(record, NUM_QUERIES) * group
        if number == 0 or get_int64(record, FIRST_ROW - RECORD_SIZE) != first_row:
            later = number + 1
            while later < get_int64(plan, NUM_RECORDS):
                if get_int64(plan, HEADER_SIZE + later * RECORD_SIZE + FIRST_ROW) != first_row:
                    break
                merge(states + unit * state_bytes, states + (later * num_kv_heads + head) * state_bytes, width, rows)
                later += 1
            first_head = out + head * group * head_bytes + first_row * row_bytes
            own, own_scale = states + unit * state_bytes, _scale_of(v_scales, head)
            _finish_tile(own, rows, group, first_head, q_dtype, row_bytes, head_dim, scratch, own_scale)
        unit = next_unit(control)
    end(control)


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
    """How to multiply: float32, bfloat16 pairs, or these where they lie, which has other bits and suits few rows."""
    if not HAS_BFLOAT16 or not q.dtype == k_cache.dtype == torch.bfloat16 or q.shape[2] % COLUMNS:
        return WIDE
    return IN_PLACE if most_rows <= FEW_ROWS else PAIRS


def _tile_queries(group: int) -> int:
    return max(1, TILE_ROWS // group)


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
        by_split = int(seq_lens.shape[0] * num_kv_heads < _min_units() and most_records > seq_lens.shape[0])
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
        tokens_per_page,
        num_q_heads,
        num_kv_heads,
        head_dim,
        sliding_window,
        states.data_ptr(),
        state_bytes,
        row_bytes,
        _way(q, k_cache, most_rows if num_rows == seq_lens.shape[0] and not batch_invariant else TILE_ROWS),
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
