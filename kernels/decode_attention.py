"""Attention of one new token per sequence over its pages: `paged_attention` where every query length is 1.

An operation of its own because on a GPU it is bound by memory, not by products, and is captured in graphs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from aiexport_edge.kernels.paged_attention import paged_attention, paged_attention_reference

if TYPE_CHECKING:
    from aiexport_edge.kernels.cpu.attention import AttentionPlan


@functools.lru_cache(maxsize=512)  # the tensor lives on, since recorded launches hold its address
def _query_start_loc(batch: int, device: torch.device) -> torch.Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device)


def decode_attention_reference(
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
) -> torch.Tensor:
    """`paged_attention_reference` of q [B, Hq, D], the last token of each sequence. seq_lens int32 [B], the new tokens
    counted; a sequence of length 0 (a padding row) gets zeros. Returns [B, Hq, D] in q's dtype."""
    query_start_loc = _query_start_loc(q.shape[0], q.device)
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


def plan_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sliding_window: int = 0,
    batch_invariant: bool = False,
) -> torch.Tensor | AttentionPlan | None:
    """What the layers of a step that have the same shapes, lengths and window share of their work; for `plan`.

    None where they share nothing.
    """
    if q.is_cuda and not batch_invariant:
        from aiexport_edge.kernels.gpu import decode_attention as gpu

        return gpu.plan_splits(q, k_cache, block_tables, seq_lens, sliding_window=sliding_window)
    if q.device.type == "cpu":
        from aiexport_edge.kernels.cpu import attention as cpu

        query_start_loc = _query_start_loc(q.shape[0], q.device)
        return cpu.plan_attention(q, k_cache, block_tables, query_start_loc, seq_lens, sliding_window=sliding_window)
    return None


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
    plan: torch.Tensor | AttentionPlan | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """See `decode_attention_reference`. `plan`: what `plan_decode` said, or None to have it found again.

    `batch_invariant`: a token's bits are those that `paged_attention` gives it, decoded or prefilled, alone or not;
    on a GPU at the price of splits.
    """
    if q.is_cuda and not batch_invariant:
        from aiexport_edge.kernels.gpu import decode_attention as gpu

        assert plan is None or isinstance(plan, torch.Tensor)
        return gpu.decode_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            scale=scale,
            sliding_window=sliding_window,
            k_scale=k_scale,
            v_scale=v_scale,
            num_splits=plan,
        )
    query_start_loc = _query_start_loc(q.shape[0], q.device)
    if plan is not None and q.device.type == "cpu":
        from aiexport_edge.kernels.cpu import attention as cpu

        assert isinstance(plan, cpu.AttentionPlan)
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
            batch_invariant=batch_invariant,
        )
    return paged_attention(
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
