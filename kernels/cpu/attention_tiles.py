"""The kernels of paged attention. A unit of work is a tile of queries of one sequence for one KV head, with all query
heads of it; or decodes of several sequences that begin with the same pages.

    position   0 . . . . 63 | 64 . . . 127 | ...            blocks of 64 keys, anchored at position 0
    split      0 . . . . . . . . . . . . . . . . 2047 | ... softmax starts afresh at each split, splits merge in order

Keys and values of a block are read through the block table into float32 scratch, keys transposed, once for all rows of
the tile. Blocks and splits are places in the sequence, so neither chunking nor batch, threads or what is shared with
neighbours change a bit of a row.
"""

from __future__ import annotations

import numpy as np

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
    NUM_QUERIES,
    NUM_RECORDS,
    POSITION,
    RECORD_SIZE,
    SEQUENCE,
    SHARED,
    SPLIT,
)
from aiexport_edge.kernels.cpu.attention_rows import (
    BLOCK,
    COLUMNS,
    add_values,
    clear,
    finish,
    merge,
    score_rows,
    weigh,
)
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
from aiexport_edge.kernels.cpu.units import begin, end, next_unit
from aiexport_edge.kernels.cpu.words import gather_columns

WIDE, PAIRS, IN_PLACE = range(3)  # how to multiply: `attention.paged_attention` chooses


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
def _attend_span(
    start: int,
    end_key: int,
    seen: int,
    keys: int,
    k_page: int,
    k_token: int,
    values: int,
    v_page: int,
    v_token: int,
    page_table: int,
    tokens_per_page: int,
    dtype: int,
    head_dim: int,
    queries: int,
    rows: int,
    group: int,
    window: int,
    pairs: int,
    factor: float,
    state: int,
    scratch: int,
) -> None:
    """Positions start .. end_key - 1, all in one split, for all rows; the first row sees keys below `seen`."""
    here, following = scratch, scratch + 16 * BLOCK
    work_space = following + 16 * BLOCK
    count = min(BLOCK, end_key - start)
    _locate(keys, k_page, k_token, page_table, tokens_per_page, start, count, here)
    _locate(values, v_page, v_token, page_table, tokens_per_page, start, count, here + 8 * BLOCK)
    for base in range(start, end_key, BLOCK):
        after = base + BLOCK
        next_count = max(0, min(BLOCK, end_key - after))
        if next_count > 0:
            _locate(keys, k_page, k_token, page_table, tokens_per_page, after, next_count, following)
            after_values = following + 8 * BLOCK
            _locate(values, v_page, v_token, page_table, tokens_per_page, after, next_count, after_values)
        _attend_block(
            here,
            count,
            following,
            next_count,
            dtype,
            head_dim,
            queries,
            rows,
            group,
            seen - base,
            window,
            pairs,
            factor,
            state,
            work_space,
        )
        here, following, count = following, here, next_count


@inner
def _load_queries(
    source: int,
    dtype: int,
    rows: int,
    group: int,
    row_bytes: int,
    head_bytes: int,
    head_dim: int,
    factor: float,
    pairs: int,
    queries: int,
) -> None:
    """The rows of a tile, from the first query's first head on, as `pairs` wants them; float32 times `factor`."""
    width = (head_dim + COLUMNS - 1) // COLUMNS * COLUMNS
    scale = splat(np.float32(factor))
    arranged = 0
    if pairs == PAIRS:
        arranged = rows // LANES * LANES
        places = queries + 2 * rows * head_dim  # words take half of what is there
        for first in range(0, arranged, LANES):
            for row in range(first, first + LANES):
                set_int64(places, row - first, source + row // group * row_bytes + row % group * head_bytes)
            for i in range(0, head_dim, 2 * LANES):
                gather_columns(places, 2 * i, queries + 4 * (i // 2 * rows + first), 4 * rows)
    for row in range(arranged, rows):
        place = queries + 4 * row * width
        head = source + row // group * row_bytes + row % group * head_bytes
        if pairs == IN_PLACE:
            copy_words(head, head_dim // 2, queries + 2 * row * head_dim)
        elif pairs != 0:
            arrange_query(head, head_dim, queries, row, rows)
        else:
            widen(dtype, head, place, head_dim)
            for i in range(0, head_dim, LANES):
                store(place + 4 * i, multiply(load(place + 4 * i), scale))


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
    seq_lens: int,
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
    work_space = next_split + state_bytes
    scale = as_float(scale_bits)

    unit = begin(control)
    while unit < num_units:
        record, head = plan + 8 * (HEADER_SIZE + unit // num_kv_heads * RECORD_SIZE), unit % num_kv_heads
        first_head = head * group * head_bytes + get_int64(record, FIRST_ROW) * row_bytes
        position, rows = get_int64(record, POSITION), get_int64(record, NUM_QUERIES) * group
        stop, shared = position + get_int64(record, NUM_QUERIES), get_int64(record, SHARED)
        sequence = get_int64(record, SEQUENCE)
        page_table = block_tables + 4 * sequence * tables_stride
        head_keys, head_values = keys + head * k_head, values + head * v_head
        whole = states + unit * state_bytes if by_split else own_state
        factor = scale * _scale_of(k_scales, head)
        _load_queries(q + first_head, q_dtype, rows, group, row_bytes, head_bytes, head_dim, factor, pairs, queries)

        # What all see alike. Its last split is left open where it is not whole: each goes on with it.
        for split in range((shared + SPLIT - 1) // SPLIT):
            state = whole if split == 0 else next_split
            clear(state, width, rows)
            _attend_span(
                split * SPLIT,
                min(shared, (split + 1) * SPLIT),
                shared,
                head_keys,
                k_page,
                k_token,
                head_values,
                v_page,
                v_token,
                page_table,
                tokens_per_page,
                kv_dtype,
                head_dim,
                queries,
                rows,
                group,
                0,
                pairs,
                scale,
                state,
                work_space,
            )
            if state != whole and (split + 1) * SPLIT <= shared:
                merge(whole, state, width, rows)

        # The rest: of the one sequence, or of each by itself.
        first_split, end_split, own_rows, members = (
            get_int64(record, FIRST_SPLIT),
            get_int64(record, END_SPLIT),
            rows,
            1,
        )
        if shared > 0:
            own_rows, members = group, rows // group
        for member in range(members):
            offset = member * group * 4 * (width + 2 * LANES)
            if shared > 0:
                stop = get_int32(seq_lens, sequence + member)
                position, first_split, end_split = stop - 1, shared // SPLIT, (stop + SPLIT - 1) // SPLIT
                page_table = block_tables + 4 * (sequence + member) * tables_stride
                source = q + first_head + member * row_bytes
                _load_queries(source, q_dtype, group, group, row_bytes, head_bytes, head_dim, factor, pairs, queries)
            for split in range(first_split, end_split):
                start, end_key = max(shared, split * SPLIT), min(stop, (split + 1) * SPLIT)
                state = (whole if split == (0 if shared > 0 else first_split) else next_split) + offset
                if start == split * SPLIT:
                    clear(state, width, own_rows)
                if window > 0:
                    start = max(start, (position - window + 1) // BLOCK * BLOCK)
                _attend_span(
                    start,
                    end_key,
                    position + 1,
                    head_keys,
                    k_page,
                    k_token,
                    head_values,
                    v_page,
                    v_token,
                    page_table,
                    tokens_per_page,
                    kv_dtype,
                    head_dim,
                    queries,
                    own_rows,
                    group,
                    window,
                    pairs,
                    scale,
                    state,
                    work_space,
                )
                if state != whole + offset:
                    merge(whole + offset, state, width, own_rows)

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
