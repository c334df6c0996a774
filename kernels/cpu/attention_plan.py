"""How attention is cut into units of work, for a batch as block tables and lengths describe it. Reads no keys.

Neighbours in the batch with one query each, whose first pages are the same, are one record: what they share is read
once for all of them, block by block as each would read it, and the rest by each for itself.
"""

from __future__ import annotations

from aiexport_edge.kernels.cpu.attention_rows import BLOCK
from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.memory import get_int32, get_int64, set_int64

SPLIT = 2048  # positions

# A plan: its header, then one record per tile or, where sequences are shared out, per split of a tile; all int64.
NUM_RECORDS, MOST_QUERIES, ZERO_FROM, BY_SPLIT, NANOSECONDS, NUM_UNITS, NUM_MERGES = range(7)
# `SHARED` positions, whole blocks, are the same for a record's sequences; where it is not 0, each has one query.
SEQUENCE, FIRST_ROW, NUM_QUERIES, POSITION, FIRST_SPLIT, END_SPLIT, SHARED = range(7)
HEADER_SIZE, RECORD_SIZE = 7, 7

MIN_SHARED = 2 * BLOCK  # positions


@inner
def _common(block_tables: int, tables_stride: int, sequence: int, most_pages: int) -> int:
    """How many of the first pages of a sequence are those of the one before it."""
    own = block_tables + 4 * sequence * tables_stride
    before = own - 4 * tables_stride
    pages = 0
    while pages < most_pages and get_int32(own, pages) == get_int32(before, pages):
        pages += 1
    return pages


@inner
def _find_group(
    block_tables: int,
    tables_stride: int,
    tokens_per_page: int,
    query_start_loc: int,
    seq_lens: int,
    sequence: int,
    num_sequences: int,
    most: int,
    record: int,
) -> int:
    """How many sequences from this one on, `most` of them, can be one record; what they share, into the record."""
    # The last position is a sequence's own.
    pages = (get_int32(seq_lens, sequence) - 1) // tokens_per_page
    shared, count = 0, 1
    while count < most and sequence + count < num_sequences:
        following = sequence + count
        length = get_int32(seq_lens, following)
        if length == 0 or get_int32(query_start_loc, following + 1) - get_int32(query_start_loc, following) != 1:
            break
        pages = _common(block_tables, tables_stride, following, min(pages, (length - 1) // tokens_per_page))
        common = pages * tokens_per_page // BLOCK * BLOCK
        if common < MIN_SHARED or 2 * common < shared:
            break
        shared = common
        count += 1
    set_int64(record, SHARED, shared if count > 1 else 0)
    return count


@kernel
def plan_tiles(
    control: int,
    scratch: int,
    num_units: int,
    plan: int,
    query_start_loc: int,
    seq_lens: int,
    block_tables: int,
    tables_stride: int,
    tokens_per_page: int,
    most_shared: int,
    num_sequences: int,
    tile_queries: int,
    window: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    min_units: int,
) -> None:
    """One unit: the tiles of all sequences, each sequence's last and longest first; by splits where tiles are too few.

    At most `most_shared` sequences become one record, none where they are cut by splits or see a window only.

    Rows of the result from `ZERO_FROM` on are to be zeroed: those after the last sequence, and all where a sequence has
    queries but no tokens (a padding row), since its rows are in no tile.
    """
    num_tiles, longest = 0, 0
    for sequence in range(num_sequences):
        num_queries = get_int32(query_start_loc, sequence + 1) - get_int32(query_start_loc, sequence)
        num_tiles += (num_queries + tile_queries - 1) // tile_queries
        longest = max(longest, get_int32(seq_lens, sequence))
    by_split = 1 if num_tiles * num_kv_heads < min_units and longest > SPLIT else 0
    records, most_queries, work = 0, 0, 0
    zero_from = get_int32(query_start_loc, num_sequences)
    sequence, following = 0, 0
    while following < num_sequences:
        sequence = following
        following = sequence + 1
        start, stop = get_int32(query_start_loc, sequence), get_int32(query_start_loc, sequence + 1)
        if get_int32(seq_lens, sequence) == 0:
            zero_from = 0 if stop > start else zero_from
            continue
        record = plan + 8 * (HEADER_SIZE + records * RECORD_SIZE)
        if stop - start == 1 and most_shared > 1 and by_split == 0 and window == 0:
            count = _find_group(
                block_tables,
                tables_stride,
                tokens_per_page,
                query_start_loc,
                seq_lens,
                sequence,
                num_sequences,
                most_shared,
                record,
            )
            if count > 1:
                following = sequence + count
                set_int64(record, SEQUENCE, sequence)
                set_int64(record, FIRST_ROW, start)
                set_int64(record, NUM_QUERIES, count)
                set_int64(record, POSITION, get_int32(seq_lens, sequence) - 1)
                set_int64(record, FIRST_SPLIT, 0)
                set_int64(record, END_SPLIT, 0)
                records += 1
                most_queries = max(most_queries, count)
                shared = get_int64(record, SHARED)
                work += shared * (8 + 2 * count * group)
                for member in range(sequence, following):
                    work += (get_int32(seq_lens, member) - shared) * (8 + 2 * group)
                continue
        for tile in range((stop - start + tile_queries - 1) // tile_queries - 1, -1, -1):
            first = start + tile * tile_queries
            count = min(tile_queries, stop - first)
            position = get_int32(seq_lens, sequence) - (stop - first)
            lowest = max(0, position - window + 1) if window > 0 else 0
            first_split, end_split = lowest // SPLIT, (position + count + SPLIT - 1) // SPLIT
            step = 1 if by_split else end_split - first_split
            for split in range(first_split, end_split, step):
                record = plan + 8 * (HEADER_SIZE + records * RECORD_SIZE)
                set_int64(record, SEQUENCE, sequence)
                set_int64(record, FIRST_ROW, first)
                set_int64(record, NUM_QUERIES, count)
                set_int64(record, POSITION, position)
                set_int64(record, FIRST_SPLIT, split)
                set_int64(record, END_SPLIT, split + step)
                set_int64(record, SHARED, 0)
                records += 1
            most_queries = max(most_queries, count)
            work += (position + count - lowest) * (8 + 2 * count * group)
    units = records * num_kv_heads
    set_int64(plan, NUM_UNITS, units)
    set_int64(plan, NUM_MERGES, units if by_split else 0)
    set_int64(plan, NUM_RECORDS, records)
    set_int64(plan, MOST_QUERIES, most_queries)
    set_int64(plan, ZERO_FROM, zero_from)
    set_int64(plan, BY_SPLIT, by_split)
    set_int64(plan, NANOSECONDS, work * num_kv_heads * head_dim // 48)
