"""How attention is cut into units of work, for a batch as block tables and lengths describe it. Reads no keys."""

from __future__ import annotations

from aiexport_edge.kernels.cpu.jit import kernel
from aiexport_edge.kernels.cpu.memory import get_int32, set_int64

SPLIT = 2048  # positions

# A plan: its header, then one record per tile or, where sequences are shared out, per split of a tile; all int64.
NUM_RECORDS, MOST_QUERIES, ZERO_FROM, BY_SPLIT, NANOSECONDS, NUM_UNITS, NUM_MERGES = range(7)
SEQUENCE, FIRST_ROW, NUM_QUERIES, POSITION, FIRST_SPLIT, END_SPLIT = range(6)
HEADER_SIZE, RECORD_SIZE = 7, 6


@kernel
def plan_tiles(
    control: int,
    scratch: int,
    num_units: int,
    plan: int,
    query_start_loc: int,
    seq_lens: int,
    num_sequences: int,
    tile_queries: int,
    window: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    min_units: int,
) -> None:
    """One unit: the tiles of all sequences, each sequence's last and longest first; by splits where tiles are too few.

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
    for sequence in range(num_sequences):
        start, stop = get_int32(query_start_loc, sequence), get_int32(query_start_loc, sequence + 1)
        if get_int32(seq_lens, sequence) == 0:
            zero_from = 0 if stop > start else zero_from
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
