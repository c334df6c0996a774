"""Random pages, block tables and lengths for attention, as the engine lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Paged:
    """Arguments of `paged_attention`; the pages of a sequence lie apart. seq_lens [B] and block_tables [B, pages]."""

    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor


def paged(
    lengths: Sequence[int],
    chunks: Sequence[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    tokens_per_page: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Paged:
    """Sequences of `lengths` tokens, of which the last `chunks` are new. Keys and values are standard normal."""
    counts = [-(-length // tokens_per_page) for length in lengths]
    num_pages = 1 + sum(counts)
    # As in the pool: a page holds the keys, then the values, of a layer; views of it are strided.
    memory = torch.randn(num_pages, 2, num_kv_heads, tokens_per_page, head_dim, device=device, dtype=dtype)
    order = (torch.randperm(num_pages - 1, device=device) + 1).to(torch.int32)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=device)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[first : first + count]
        first += count
    starts = torch.tensor([0, *chunks]).cumsum(0).to(device=device, dtype=torch.int32)
    seq_lens = torch.tensor(list(lengths), dtype=torch.int32, device=device)
    return Paged(memory[:, 0], memory[:, 1], tables, starts, seq_lens)
