"""Causal attention over keys and values that lie in pages, for any mix of prefill chunks and decodes.

Pages are read in place ("PagedAttention", W. Kwon et al., SOSP '23) with any number of tokens to a page. Softmax runs
online over blocks of keys (M. Milakov, N. Gimelshein, 2018; T. Dao et al., "FlashAttention", 2022). Knows nothing of
requests: block tables and lengths say it all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from aiexport_edge.kernels import kv_codes

if TYPE_CHECKING:
    from aiexport_edge.kernels.cpu.attention import AttentionPlan


def paged_attention_reference(
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
) -> torch.Tensor:
    """softmax(scale * q kᵀ) v for the last queries of each sequence, causal.

    q [T, Hq, D]: the new tokens of B sequences one after the other; query_start_loc int32 [B+1] their borders (decode
    is a length of 1, a length of 0 is allowed). seq_lens int32 [B] counts all tokens of a sequence, the new ones too,
    so its last query stands at position seq_lens[b] - 1; one of length 0 (padding) gets zeros. k_cache,
    v_cache [num_pages, Hkv, tokens_per_page, D], strided, last dimension contiguous, float32, bfloat16 or float16; Hq
    is a multiple of Hkv, query head h reads KV head h // (Hq / Hkv). block_tables int32 [B, max_pages]: position p lies
    in page block_tables[b, p // tokens_per_page]; entries past a sequence's end are never read. sliding_window w > 0: a
    query sees only its own and the w - 1 positions before it. With k_scale and v_scale (float32 [Hkv]) the caches hold
    E4M3 codes (`kv_codes`), as float8_e4m3fn or uint8. float32 inside. Returns [T, Hq, D] in q's dtype, zero past
    query_start_loc[B].
    """
    out = torch.zeros_like(q)
    num_q_heads, head_dim = q.shape[1:]
    num_kv_heads, tokens_per_page = k_cache.shape[1:3]
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for sequence, length in enumerate(lengths):
        start, end = starts[sequence], starts[sequence + 1]
        if start == end:
            continue
        pages = block_tables[sequence, : -(-length // tokens_per_page)].long()
        # [pages, heads, tokens, D] -> [heads, positions, D]
        keys = kv_codes.decode(k_cache[pages], k_scale).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :length]
        values = (
            kv_codes.decode(v_cache[pages], v_scale).transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :length]
        )
        queries = q[start:end].float().transpose(0, 1).reshape(num_kv_heads, -1, end - start, head_dim)
        scores = torch.matmul(queries, keys.unsqueeze(1).transpose(-1, -2)) * scale
        query_positions = torch.arange(length - (end - start), length, device=q.device).unsqueeze(1)
        key_positions = torch.arange(length, device=q.device).unsqueeze(0)
        visible = key_positions <= query_positions
        if sliding_window > 0:
            visible &= key_positions > query_positions - sliding_window
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
        attended = torch.matmul(weights, values.unsqueeze(1)).reshape(num_q_heads, end - start, head_dim)
        out[start:end] = attended.transpose(0, 1).to(q.dtype)
    return out


def plan_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sliding_window: int = 0,
) -> AttentionPlan | None:
    """What the layers of a step that have the same shapes, lengths and window share of their work; for `plan`.

    None where they share nothing. Of `q` the shape is wanted alone.
    """
    if q.device.type != "cpu":
        return None
    from aiexport_edge.kernels.cpu import attention as cpu

    return cpu.plan_attention(q, k_cache, block_tables, query_start_loc, seq_lens, sliding_window=sliding_window)


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
    plan: AttentionPlan | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """See `paged_attention_reference`. `plan`: what `plan_attention` said, or None to have it found again.

    `batch_invariant`: a token's bits do not depend on what is computed with it. On the CPU they never do.
    """
    if q.device.type == "cpu":
        from aiexport_edge.kernels.cpu import attention as cpu

        return cpu.paged_attention(
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
            plan=plan,
        )
    if q.is_cuda:
        from aiexport_edge.kernels.gpu import paged_attention as gpu

        return gpu.paged_attention(
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
        )
    return paged_attention_reference(
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
    )
