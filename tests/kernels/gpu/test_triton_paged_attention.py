"""Prefill attention in the interpreter against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, kv_codes_of, page_layout, poisoned, randn

from aiexport_edge.kernels.gpu.launch import KNOWN, Architecture
from aiexport_edge.kernels.gpu.paged_attention import paged_attention, settings
from aiexport_edge.kernels.paged_attention import paged_attention_reference

SMALL = Architecture(86, 4)


def check(
    chunks: list[tuple[int, int]],
    *,
    group: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 64,
    tokens_per_page: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    sliding_window: int = 0,
    spare_rows: int = 0,
    architecture: Architecture = SMALL,
) -> None:
    """chunks: (tokens before, new tokens) of each sequence; `spare_rows` of q belong to no sequence."""
    generator = torch.Generator().manual_seed(len(chunks) + head_dim)
    seq_lens = [before + new for before, new in chunks]
    pages = page_layout(
        generator,
        seq_lens,
        num_kv_heads=num_kv_heads,
        tokens_per_page=tokens_per_page,
        head_dim=head_dim,
        dtype=dtype,
        spare_columns=1,
    )
    starts = torch.tensor([0, *(new for _, new in chunks)], dtype=torch.int32).cumsum(0).int()
    num_tokens = int(starts[-1]) + spare_rows
    wide = randn(generator, num_tokens, num_kv_heads * group + 1, head_dim, dtype=dtype)
    q = wide[:, 1:]  # as a part of something larger
    with poisoned():
        actual = paged_attention(
            q,
            pages.k_cache,
            pages.v_cache,
            pages.block_tables,
            starts,
            pages.seq_lens,
            scale=head_dim**-0.5,
            sliding_window=sliding_window,
            architecture=architecture,
        )
    pages = replace(pages, k_cache=pages.k_cache.nan_to_num(), v_cache=pages.v_cache.nan_to_num())
    expected = paged_attention_reference(
        q,
        pages.k_cache,
        pages.v_cache,
        pages.block_tables,
        starts,
        pages.seq_lens,
        scale=head_dim**-0.5,
        sliding_window=sliding_window,
    )
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check([(40, 70), (0, 33)], head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16, 20])
def test_group_sizes(group: int) -> None:
    check([(11, 19), (0, 40)], group=group, num_kv_heads=2)


@pytest.mark.parametrize("tokens_per_page", [1, 7, 16, 18, 28, 36, 200])
def test_page_borders(tokens_per_page: int) -> None:
    check([(tokens_per_page, tokens_per_page), (0, tokens_per_page + 1), (70, 3)], tokens_per_page=tokens_per_page)


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 1)],
        [(0, 64)],
        [(64, 64)],
        [(63, 1), (64, 1), (65, 1), (0, 1)],
        [(10, 0), (5, 90), (0, 0), (130, 2), (9, 0)],
        [(200, 1), (0, 100), (31, 1)],
    ],
    ids=str,
)
def test_chunk_lengths(chunks: list[tuple[int, int]]) -> None:
    check(chunks)


def test_rows_of_no_sequence_are_zero() -> None:
    check([(3, 20), (0, 9)], spare_rows=37)


@pytest.mark.parametrize("sliding_window", [1, 20, 64, 1000])
def test_sliding_window(sliding_window: int) -> None:
    check([(100, 80), (0, 90), (150, 1)], sliding_window=sliding_window, tokens_per_page=18, group=4)


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: str(architecture.capability))
def test_every_architectures_blocks(architecture: Architecture) -> None:
    check([(70, 130), (0, 64)], head_dim=128, group=4, architecture=architecture)


def test_fp8_cache() -> None:
    generator = torch.Generator().manual_seed(3)
    pages = page_layout(generator, [90, 17], num_kv_heads=2, tokens_per_page=18, head_dim=80, dtype=torch.bfloat16)
    scales = 0.02 + 0.02 * torch.rand(2, 2, generator=generator)
    starts = torch.tensor([0, 50, 67], dtype=torch.int32)
    q = randn(generator, 67, 8, 80, dtype=torch.bfloat16)
    arguments = (q, *kv_codes_of(pages, *scales), pages.block_tables, starts, pages.seq_lens)
    options: dict[str, Any] = {"scale": 0.1, "k_scale": scales[0], "v_scale": scales[1]}
    with poisoned():
        actual = paged_attention(*arguments, **options, architecture=SMALL)
    assert_close(actual, paged_attention_reference(*arguments, **options), torch.bfloat16)


def test_settings_hold_a_whole_group() -> None:
    for architecture in KNOWN:
        for group in (1, 3, 16, 71):
            for num_tokens in (1, 40, 10_000):
                for head_dim in (64, 80, 96, 128, 256):
                    setting = settings(
                        architecture,
                        num_tokens=num_tokens,
                        num_sequences=3,
                        group=group,
                        head_dim=head_dim,
                        element_size=2,
                    )
                    assert setting.block_rows >= max(16, group)


@pytest.mark.parametrize("architecture", [KNOWN[0], KNOWN[-1]], ids=lambda architecture: str(architecture.capability))
def test_batch_invariant_bits(architecture: Architecture) -> None:
    """A sequence's rows, all at once, in two chunks, and the last alone and beside a longer sequence."""
    generator = torch.Generator().manual_seed(8)
    pages = page_layout(generator, [150, 200], num_kv_heads=2, tokens_per_page=18, head_dim=64, dtype=torch.bfloat16)
    q = randn(generator, 150, 8, 64, dtype=torch.bfloat16)

    def attend(queries: torch.Tensor, starts: list[int], lengths: list[int], rows: slice) -> torch.Tensor:
        return paged_attention(
            queries,
            pages.k_cache,
            pages.v_cache,
            pages.block_tables[rows],
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            scale=0.125,
            batch_invariant=True,
            architecture=architecture,
        )

    whole = attend(q, [0, 150], [150], slice(0, 1))
    assert torch.equal(attend(q[:71], [0, 71], [71], slice(0, 1)), whole[:71])
    assert torch.equal(attend(q[71:], [0, 79], [150], slice(0, 1)), whole[71:])
    assert torch.equal(attend(q[149:], [0, 1], [150], slice(0, 1)), whole[149:])
    beside = torch.cat((q[149:], q[:90]))
    assert torch.equal(attend(beside, [0, 1, 91], [150, 200], slice(0, 2))[:1], whole[149:])
