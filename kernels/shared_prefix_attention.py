"""Decode attention of sequences that share their first pages, such as requests with one long system prompt.

The same result as `decode_attention`; what is shared is read once. Pays where a group is large and its prefix long.
"""

from __future__ import annotations

import torch

from aiexport_edge.kernels.decode_attention import decode_attention, decode_attention_reference


def shared_prefix_attention_reference(
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
) -> torch.Tensor:
    """`decode_attention_reference` of q [B, Hq, D], with what its sequences share made known.

    group_start_loc int32 [G+1]: sequences group_start_loc[g] … group_start_loc[g+1]-1 are neighbours in the batch whose
    first prefix_lens[g] (int32 [G], at most their shortest seq_len) tokens lie in the same pages; 0 where they share
    nothing; from 0 to B. Returns [B, Hq, D] in q's dtype.
    """
    starts = group_start_loc.tolist()
    tables = block_tables.clone()
    for group, length in enumerate(prefix_lens.tolist()):
        shared = length // k_cache.shape[2]
        tables[starts[group] : starts[group + 1], :shared] = block_tables[starts[group], :shared]
    return decode_attention_reference(
        q, k_cache, v_cache, tables, seq_lens, scale=scale, k_scale=k_scale, v_scale=v_scale
    )


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
) -> torch.Tensor:
    """See `shared_prefix_attention_reference`. On a CPU `decode_attention` finds by itself what is shared."""
    if q.is_cuda:
        from aiexport_edge.kernels.gpu import shared_prefix_attention as gpu

        return gpu.shared_prefix_attention(
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
        )
    return decode_attention(q, k_cache, v_cache, block_tables, seq_lens, scale=scale, k_scale=k_scale, v_scale=v_scale)
