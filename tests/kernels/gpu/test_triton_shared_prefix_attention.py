"""Shared-prefix decode attention in the interpreter against the reference, which shares nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, page_layout, poisoned, randn

from aiexport_edge.kernels.gpu.launch import Architecture
from aiexport_edge.kernels.gpu.shared_prefix_attention import shared_prefix_attention
from aiexport_edge.kernels.shared_prefix_attention import shared_prefix_attention_reference

SMALL = Architecture(86, 4)


def check(
    seq_lens: list[int],
    starts: list[int],
    prefix_lens: list[int],
    *,
    shared_pages: int,
    group: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 64,
    tokens_per_page: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """The first `shared_pages` pages are the same for all; groups and prefix lengths say how much of it is used."""
    generator = torch.Generator().manual_seed(len(seq_lens))
    pages = page_layout(
        generator,
        seq_lens,
        num_kv_heads=num_kv_heads,
        tokens_per_page=tokens_per_page,
        head_dim=head_dim,
        dtype=dtype,
        shared_pages=shared_pages,
    )
    q = randn(generator, len(seq_lens), num_kv_heads * group, head_dim, dtype=dtype)
    groups = torch.tensor(starts, dtype=torch.int32), torch.tensor(prefix_lens, dtype=torch.int32)
    arguments = (q, pages.k_cache, pages.v_cache, pages.block_tables, pages.seq_lens, *groups)
    with poisoned():
        actual = shared_prefix_attention(*arguments, scale=head_dim**-0.5, architecture=SMALL)
    pages = replace(pages, k_cache=pages.k_cache.nan_to_num(), v_cache=pages.v_cache.nan_to_num())
    arguments = (q, pages.k_cache, pages.v_cache, pages.block_tables, pages.seq_lens, *groups)
    assert_close(actual, shared_prefix_attention_reference(*arguments, scale=head_dim**-0.5), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_one_group(head_dim: int, dtype: torch.dtype) -> None:
    check([97, 120, 150], [0, 3], [96], shared_pages=6, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("group", [1, 3, 4, 16])
def test_groups_of_all_kinds(group: int) -> None:
    """A group without a prefix, one whose members end with it, one of a single member, an empty one."""
    check(
        [70, 40, 36, 36, 90, 37],
        [0, 2, 4, 4, 5, 6],
        [0, 36, 18, 54, 18],
        shared_pages=2,
        group=group,
        tokens_per_page=18,
    )


def test_a_long_prefix_is_split() -> None:
    check([1300, 1281, 1600], [0, 3], [1280], shared_pages=80, num_kv_heads=2)


def test_a_group_of_many_blocks() -> None:
    check([40] * 40, [0, 1, 40], [0, 32], shared_pages=2, group=4)


def test_padding_rows_stand_alone() -> None:
    check([50, 60, 0, 0], [0, 2, 3, 4], [48, 0, 0], shared_pages=3)
