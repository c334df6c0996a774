"""Decode attention on a GPU: one query a sequence, keys split over the card, KV heads' queries packed together.

What it computes is in `aiexport_edge.kernels.decode_attention`. The grid depends on shapes alone, so a captured graph
serves all lengths: how many parts a sequence is cut into is computed on the device from the lengths, surplus programs
return. That is done once a step (`plan_splits`), not once a layer.

    one sequence's tiles   |0 1 2 3|4 5 6 7|8 9 .|   three splits, each a program per KV head -> states -> merged
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.attention_tiles import (
    BETWEEN,
    attend_tile,
    merge_states_launch,
    padded_head_dim,
    score_factor,
)
from aiexport_edge.kernels.gpu.elementwise import E4M3_DECODED_SCALE
from aiexport_edge.kernels.gpu.launch import (
    Architecture,
    Launch,
    architecture_of,
    ceil_div,
    next_power_of_2,
    shared_limit,
)

FEWEST_SPLIT_TOKENS = 256  # a shorter part costs more in merging than it saves
MOST_SPLITS = 128
# The page numbers of a tile are loaded two stages before its keys, so this many stages keep one tile on the way while
# another is computed on (3 and 4 have a single buffer).
NUM_STAGES = 5
LARGEST_BATCH = 4096


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """`tile` keys a step; at most `max_splits` parts a sequence; `programs` are to be busy at once, over the card."""

    tile: int
    num_warps: int
    num_stages: int
    max_splits: int
    programs: int


def settings(
    architecture: Architecture,
    *,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_size: int,
    max_context: int,
    split_tokens: int = 0,
) -> DecodeSettings:
    """Launch settings from shapes alone. `max_context`: what the block tables hold; `split_tokens`: see `plan_splits`.

    Two blocks an SM, each with one tile of keys and values on the way while it computes on another, keep the memory
    busy: 32 KiB a tile where an SM has 228 KiB of shared memory, half of that elsewhere. Skewed lengths need more
    programs than a balanced batch does, so there may be eight times as many as are busy at once.
    """
    padded = padded_head_dim(head_dim)
    stage_bytes = 32768 if shared_limit(architecture.capability) > 200_000 else 16384
    tile = max(16, min(128, stage_bytes // (2 * padded * max(2, element_size))))
    tile = 1 << (tile.bit_length() - 1)
    rows = max(16, next_power_of_2(num_q_heads // num_kv_heads))
    programs = 2 * architecture.num_sms
    if split_tokens:
        max_splits = ceil_div(max_context, split_tokens)
    else:
        wanted = next_power_of_2(ceil_div(8 * programs, batch * num_kv_heads))
        max_splits = max(1, min(max(4, wanted), MOST_SPLITS, ceil_div(max_context, FEWEST_SPLIT_TOKENS)))
    return DecodeSettings(tile, 4 if rows * padded <= 4096 else 8, NUM_STAGES, max_splits, programs)


@triton.jit(
    do_not_specialize=["batch", "fixed_tiles", "max_splits"],
    do_not_specialize_on_alignment=["seq_lens", "first_positions"],
)
def _plan_splits(
    seq_lens,
    first_positions,
    num_splits,
    batch,
    fixed_tiles,
    max_splits,
    HKV: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    FEWEST_TILES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """num_splits[b]: parts in which the tiles of sequence b are attended; 0 where it has none."""
    index = tl.arange(0, BLOCK)
    length = tl.load(seq_lens + index, mask=index < batch, other=0)
    first = tl.zeros([BLOCK], tl.int32)
    if WINDOW > 0:
        first = tl.maximum(first, length - WINDOW)
    if HAS_FIRST:
        first = tl.maximum(first, tl.load(first_positions + index, mask=index < batch, other=0))
    tiles = tl.where(length > first, (length + TILE - 1) // TILE - first // TILE, 0)
    balanced = (tl.sum(tiles, 0) * HKV + PROGRAMS - 1) // PROGRAMS
    per_split = tl.where(fixed_tiles > 0, fixed_tiles, tl.maximum(balanced, FEWEST_TILES))
    splits = tl.minimum((tiles + per_split - 1) // per_split, max_splits)
    tl.store(num_splits + index, splits, mask=index < batch)


@triton.jit(
    do_not_specialize=["table_stride", "num_prefix_states", "num_states"],
    do_not_specialize_on_alignment=["block_tables", "seq_lens", "first_positions", "num_splits"],
)
def _decode_attention(
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    first_positions,
    num_splits,
    k_scale,
    v_scale,
    out,
    states,
    logs,
    factor,
    q_token_stride,
    q_head_stride,
    table_stride,
    num_prefix_states,
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
    WINDOW: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    QUANTIZED: tl.constexpr,
    DECODED_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """One split of one sequence's keys for the query heads of one KV head.

    HAS_FIRST: keys before first_positions[b] are attended elsewhere, so the result is always a state.
    """
    GROUP: tl.constexpr = HQ // HKV
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.load(num_splits + sequence)
    if split >= tl.maximum(splits, 1):
        return
    length = tl.load(seq_lens + sequence)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(first, length - WINDOW)
    if HAS_FIRST:
        already = tl.load(first_positions + sequence)
        first = tl.maximum(first, already)
    else:
        already = 0
    in_group = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + in_group
    inside = (in_group < GROUP)[:, None] & (dims < D)[None, :]
    queries = tl.load(
        q + sequence * q_token_stride + heads[:, None] * q_head_stride + dims[None, :], mask=inside, other=0.0
    )
    begin_tile = first // TILE
    end_tile = tl.cdiv(length, TILE)
    per_split = tl.cdiv(end_tile - begin_tile, tl.maximum(splits, 1))
    begin = begin_tile + split * per_split
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
            first,
            length,
            in_group,
            factor,
            k_head,
            v_head,
            block_tables + sequence * table_stride,
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
    rows = sequence * HQ + heads
    if (splits <= 1) & (already == 0):
        tl.store(out + rows[:, None] * D + dims[None, :], attended.to(out.dtype.element_ty), mask=inside)
    else:
        state = rows * num_states + num_prefix_states + split
        log = tl.where(empty, float("-inf"), highest + tl.log2(tl.where(empty, 1.0, denominator)))
        tl.store(logs + state, log, mask=in_group < GROUP)
        tl.store(states + state[:, None] * D + dims[None, :], attended, mask=inside)


def plan_splits_launch(
    seq_lens: torch.Tensor,
    setting: DecodeSettings,
    *,
    num_kv_heads: int,
    sliding_window: int,
    first_positions: torch.Tensor | None = None,
    split_tokens: int = 0,
) -> tuple[Launch, torch.Tensor]:
    """The launch and the int32 [B] that it fills."""
    batch = seq_lens.shape[0]
    if batch > LARGEST_BATCH:
        raise ValueError(f"a batch of {batch} sequences is larger than {LARGEST_BATCH}")
    num_splits = torch.empty(batch, dtype=torch.int32, device=seq_lens.device)
    launch = Launch(
        _plan_splits,
        (1,),
        (
            seq_lens,
            seq_lens if first_positions is None else first_positions,
            num_splits,
            batch,
            ceil_div(split_tokens, setting.tile),
            setting.max_splits,
        ),
        {
            "HKV": num_kv_heads,
            "TILE": setting.tile,
            "WINDOW": sliding_window,
            "HAS_FIRST": first_positions is not None,
            "FEWEST_TILES": max(1, FEWEST_SPLIT_TOKENS // setting.tile),
            "PROGRAMS": setting.programs,
            "BLOCK": next_power_of_2(batch),
            "num_warps": 4,
            "num_stages": 1,
        },
    )
    return launch, num_splits


def decode_launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    num_splits: torch.Tensor,
    out: torch.Tensor,
    states: torch.Tensor,
    logs: torch.Tensor,
    setting: DecodeSettings,
    *,
    scale: float,
    sliding_window: int,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    first_positions: torch.Tensor | None = None,
    num_prefix_states: int = 0,
) -> Launch:
    """Attend the keys from `first_positions` on; states and logs from `num_prefix_states` on are this launch's."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, tokens_per_page = k_cache.shape[1:3]
    assert q.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1
    assert block_tables.stride(1) == 1 or block_tables.shape[1] == 1
    quantized = k_scale is not None
    assert (v_scale is not None) == quantized
    if quantized:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    return Launch(
        _decode_attention,
        (num_kv_heads, batch, setting.max_splits),
        (
            q,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            seq_lens if first_positions is None else first_positions,
            num_splits,
            logs if k_scale is None else k_scale,
            logs if v_scale is None else v_scale,
            out,
            states,
            logs,
            score_factor(scale, quantized=quantized),
            q.stride(0),
            q.stride(1),
            block_tables.stride(0),
            num_prefix_states,
            states.shape[2],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
        ),
        {
            "HQ": num_q_heads,
            "HKV": num_kv_heads,
            "D": head_dim,
            "TOKENS_PER_PAGE": tokens_per_page,
            "WINDOW": sliding_window,
            "HAS_FIRST": first_positions is not None,
            "QUANTIZED": quantized,
            "DECODED_SCALE": E4M3_DECODED_SCALE,
            "BLOCK_ROWS": max(16, next_power_of_2(num_q_heads // num_kv_heads)),
            "BLOCK_D": padded_head_dim(head_dim),
            "TILE": setting.tile,
            "num_warps": setting.num_warps,
            "num_stages": setting.num_stages,
        },
    )


def settings_for(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    split_tokens: int = 0,
    architecture: Architecture | None = None,
) -> DecodeSettings:
    """`settings` of these tensors' shapes on their device."""
    return settings(
        architecture or architecture_of(q.device),
        batch=q.shape[0],
        num_q_heads=q.shape[1],
        num_kv_heads=k_cache.shape[1],
        head_dim=q.shape[2],
        element_size=k_cache.element_size(),
        max_context=block_tables.shape[1] * k_cache.shape[2],
        split_tokens=split_tokens,
    )


def plan_splits(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sliding_window: int = 0,
    split_tokens: int = 0,
    architecture: Architecture | None = None,
) -> torch.Tensor:
    """int32 [B] for `decode_attention`, the same for all layers of a step: only shapes and lengths are read.

    With split_tokens every sequence is cut into parts of that many tokens, so that its result does not depend on what
    else is in the batch; otherwise the parts are such that the card is evenly busy.
    """
    setting = settings_for(q, k_cache, block_tables, split_tokens=split_tokens, architecture=architecture)
    launch, num_splits = plan_splits_launch(
        seq_lens, setting, num_kv_heads=k_cache.shape[1], sliding_window=sliding_window, split_tokens=split_tokens
    )
    launch.run()
    return num_splits


def decode_attention_launches(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    num_splits: torch.Tensor | None = None,
    split_tokens: int = 0,
    architecture: Architecture | None = None,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches, in order, and the tensor that they fill."""
    setting = settings_for(q, k_cache, block_tables, split_tokens=split_tokens, architecture=architecture)
    launches = []
    if num_splits is None:
        plan, num_splits = plan_splits_launch(
            seq_lens, setting, num_kv_heads=k_cache.shape[1], sliding_window=sliding_window, split_tokens=split_tokens
        )
        launches.append(plan)
    batch, num_q_heads, head_dim = q.shape
    out = torch.empty((batch, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    states = torch.empty((batch, num_q_heads, setting.max_splits, head_dim), dtype=torch.float32, device=q.device)
    logs = torch.empty((batch, num_q_heads, setting.max_splits), dtype=torch.float32, device=q.device)
    launches.append(
        decode_launch(
            q,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            num_splits,
            out,
            states,
            logs,
            setting,
            scale=scale,
            sliding_window=sliding_window,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    )
    if setting.max_splits > 1:
        launches.append(merge_states_launch(states, logs, None, num_splits, out, num_prefix_states=0))
    return launches, out


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    num_splits: torch.Tensor | None = None,
    split_tokens: int = 0,
    architecture: Architecture | None = None,
) -> torch.Tensor:
    """See `aiexport_edge.kernels.decode_attention.decode_attention_reference`.

    num_splits: `plan_splits` of the same shapes, lengths, sliding_window and split_tokens; computed here where absent.
    """
    launches, out = decode_attention_launches(
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        scale=scale,
        sliding_window=sliding_window,
        k_scale=k_scale,
        v_scale=v_scale,
        num_splits=num_splits,
        split_tokens=split_tokens,
        architecture=architecture,
    )
    for launch in launches:
        launch.run()
    return out
