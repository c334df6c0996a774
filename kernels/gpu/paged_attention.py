"""Prefill attention on a GPU: new chunks of any lengths over cached prefixes, causal, keys and values read in place.

What it computes is in `aiexport_edge.kernels.paged_attention`. A program takes a block of rows: the query heads of one
KV head for a few consecutive tokens of one sequence. Which sequence, it finds itself by bisection of
`query_start_loc`, so the grid depends on shapes alone; decodes may be among the chunks.

    rows of a block, group of 3:   token 0: head 0 1 2 | token 1: head 0 1 2 | …      (BLOCK_ROWS // 3 tokens)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.attention_tiles import (
    ALL,
    CAUSAL,
    attend_tile,
    owner_of_block,
    padded_head_dim,
    score_factor,
)
from aiexport_edge.kernels.gpu.elementwise import E4M3_DECODED_SCALE
from aiexport_edge.kernels.gpu.launch import Architecture, Launch, architecture_of, ceil_div, shared_limit


@dataclass(frozen=True, slots=True)
class PrefillSettings:
    """Rows of a block, keys of a tile."""

    block_rows: int
    tile: int
    num_warps: int
    num_stages: int


# (rows, tile, warps, stages) by most padded head dim, for 16-bit elements. 90 and 100 have 227 KiB of shared memory a
# block and multiply 64 rows a warp group; 80 has 163 KiB; 86, 89 and 120 have 99.
_LARGE = {64: (128, 64, 8, 5), 128: (128, 64, 8, 5), 256: (64, 64, 8, 3)}
_MEDIUM = {64: (128, 64, 8, 5), 128: (128, 32, 8, 5), 256: (64, 32, 8, 3)}
_SMALL = {64: (128, 64, 8, 3), 128: (64, 32, 4, 3), 256: (64, 16, 8, 3)}


def settings(
    architecture: Architecture,
    *,
    num_tokens: int,
    num_sequences: int,
    group: int,
    head_dim: int,
    element_size: int,
    batch_invariant: bool = False,
) -> PrefillSettings:
    """Launch settings from shapes alone; short chunks (a few rows a sequence on average) take small blocks.

    `batch_invariant`: from the model's shape alone. Tiles of keys begin at position 0, so a row's sums then run in the
    same order whatever is computed with it.
    """
    shared = shared_limit(architecture.capability)
    table = _LARGE if shared > 200_000 else _MEDIUM if shared > 150_000 else _SMALL
    padded = padded_head_dim(head_dim)
    rows, tile, num_warps, num_stages = table[max(64, padded)]
    if element_size > 2:  # float32 is for checking, not for speed
        rows, tile, num_warps, num_stages = 32, 16, 4, 2
    rows_per_sequence = 17 if batch_invariant else ceil_div(num_tokens, max(1, num_sequences)) * group
    if rows_per_sequence <= 16 or rows < 32:
        rows, num_warps = 16, 4
    elif rows_per_sequence <= 64:
        rows, num_warps = min(rows, 64), 8 if padded > 128 else 4
    while rows < group:
        rows *= 2
    return PrefillSettings(rows, tile, num_warps, num_stages)


@triton.jit(
    do_not_specialize=["num_sequences", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "query_start_loc", "seq_lens"],
)
def _paged_attention(
    q,
    k_cache,
    v_cache,
    block_tables,
    query_start_loc,
    seq_lens,
    k_scale,
    v_scale,
    out,
    factor,
    num_sequences,
    q_token_stride,
    q_head_stride,
    table_stride,
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
    QUANTIZED: tl.constexpr,
    DECODED_SCALE: tl.constexpr,
    ALL_ALIKE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """One block of rows. Blocks are counted over all sequences, each of which may leave its last one partly empty.

    ALL_ALIKE: one loop for all tiles. Where a mask comes between a product and a difference the compiler cannot fuse
    them, so a tile that is masked and one that is not differ in their last bits, and which is which goes by the block.
    """
    GROUP: tl.constexpr = HQ // HKV
    TOKENS: tl.constexpr = BLOCK_ROWS // GROUP
    kv_head = tl.program_id(0)
    # The last blocks of a long chunk see the most keys: first in, so that they are not what everything waits for.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = owner_of_block(query_start_loc, num_sequences, block, TOKENS).to(tl.int64)
    chunk_start = tl.load(query_start_loc + sequence)
    chunk_len = tl.load(query_start_loc + sequence + 1) - chunk_start
    first_token = (block - (chunk_start // TOKENS + sequence).to(tl.int32)) * TOKENS
    if first_token >= chunk_len:
        return
    length = tl.load(seq_lens + sequence)
    context = length - chunk_len
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_D)
    tokens = first_token + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    inside = ((rows < TOKENS * GROUP) & (tokens < chunk_len))[:, None] & (dims < D)[None, :]
    token_rows = (chunk_start + tokens).to(tl.int64)
    queries = tl.load(
        q + token_rows[:, None] * q_token_stride + heads[:, None] * q_head_stride + dims[None, :],
        mask=inside,
        other=0.0,
    )
    row_positions = context + tokens
    end = tl.minimum(context + first_token + TOKENS, length)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, context + first_token - WINDOW + 1)
    k_head = k_cache + kv_head.to(tl.int64) * k_head_stride
    v_head = v_cache + kv_head.to(tl.int64) * v_head_stride
    block_table = block_tables + sequence * table_stride
    if QUANTIZED:
        factor *= tl.load(k_scale + kv_head)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_ROWS], tl.float32)
    attended = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    begin_masked = first // TILE
    if WINDOW == 0 and not ALL_ALIKE:
        begin_masked = (context + first_token + 1) // TILE  # the tiles before it every row sees whole
        for tile in range(0, begin_masked):
            highest, denominator, attended = attend_tile(
                queries,
                highest,
                denominator,
                attended,
                tile,
                0,
                end,
                row_positions,
                factor,
                k_head,
                v_head,
                block_table,
                k_page_stride,
                k_token_stride,
                v_page_stride,
                v_token_stride,
                ALL,
                0,
                D,
                TOKENS_PER_PAGE,
                BLOCK_D,
                TILE,
                QUANTIZED,
            )
    for tile in range(begin_masked, tl.cdiv(end, TILE)):
        highest, denominator, attended = attend_tile(
            queries,
            highest,
            denominator,
            attended,
            tile,
            first,
            end,
            row_positions,
            factor,
            k_head,
            v_head,
            block_table,
            k_page_stride,
            k_token_stride,
            v_page_stride,
            v_token_stride,
            CAUSAL,
            WINDOW,
            D,
            TOKENS_PER_PAGE,
            BLOCK_D,
            TILE,
            QUANTIZED,
        )
    attended = attended / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    if QUANTIZED:
        attended *= tl.load(v_scale + kv_head) * DECODED_SCALE
    targets = out + (token_rows * HQ + heads)[:, None] * D + dims[None, :]
    tl.store(targets, attended.to(out.dtype.element_ty), mask=inside)


def paged_attention_launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    batch_invariant: bool = False,
    architecture: Architecture | None = None,
) -> tuple[Launch, torch.Tensor]:
    """The launch and the tensor that it fills: zeros before, for the rows past query_start_loc[B]."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, tokens_per_page = k_cache.shape[1:3]
    num_sequences = seq_lens.shape[0]
    group = num_q_heads // num_kv_heads
    assert q.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1
    assert block_tables.stride(1) == 1 or block_tables.shape[1] == 1
    quantized = k_scale is not None
    assert (v_scale is not None) == quantized
    if quantized:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    setting = settings(
        architecture or architecture_of(q.device),
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        group=group,
        head_dim=head_dim,
        element_size=q.element_size(),
        batch_invariant=batch_invariant,
    )
    out = torch.zeros((num_tokens, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    num_blocks = num_tokens // (setting.block_rows // group) + num_sequences
    launch = Launch(
        _paged_attention,
        (num_kv_heads, num_blocks),
        (
            q,
            k_cache,
            v_cache,
            block_tables,
            query_start_loc,
            seq_lens,
            out if k_scale is None else k_scale,
            out if v_scale is None else v_scale,
            out,
            score_factor(scale, quantized=quantized),
            num_sequences,
            q.stride(0),
            q.stride(1),
            block_tables.stride(0),
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
        ),
        {
            "HQ": num_q_heads,
            "HKV": num_kv_heads,
            "D": head_dim,
            "TOKENS_PER_PAGE": tokens_per_page,
            "WINDOW": sliding_window,
            "QUANTIZED": quantized,
            "DECODED_SCALE": E4M3_DECODED_SCALE,
            "ALL_ALIKE": batch_invariant,
            "BLOCK_ROWS": setting.block_rows,
            "BLOCK_D": padded_head_dim(head_dim),
            "TILE": setting.tile,
            "num_warps": setting.num_warps,
            "num_stages": setting.num_stages,
        },
    )
    return launch, out


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    batch_invariant: bool = False,
    architecture: Architecture | None = None,
) -> torch.Tensor:
    """See `aiexport_edge.kernels.paged_attention.paged_attention_reference`.

    With k_scale and v_scale (float32 [Hkv]) the caches are float8_e4m3fn, or uint8 that hold its codes.
    """
    launch, out = paged_attention_launch(
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start_loc,
        seq_lens,
        scale=scale,
        sliding_window=sliding_window,
        k_scale=k_scale,
        v_scale=v_scale,
        batch_invariant=batch_invariant,
        architecture=architecture,
    )
    launch.run()
    return out
