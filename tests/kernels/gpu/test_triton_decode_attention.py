"""Decode attention in the interpreter against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.kernel_cases import DTYPES, Pages, assert_close, kv_codes_of, page_layout, poisoned, randn

from aiexport_edge.kernels.decode_attention import decode_attention_reference
from aiexport_edge.kernels.gpu.decode_attention import decode_attention, plan_splits, settings
from aiexport_edge.kernels.gpu.launch import A10, H200, KNOWN, Architecture

SMALL = Architecture(80, 4)  # few programs, so that few splits


def check(
    seq_lens: list[int],
    *,
    group: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 64,
    tokens_per_page: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    sliding_window: int = 0,
    spare_columns: int = 0,
    **options: Any,
) -> None:
    generator = torch.Generator().manual_seed(sum(seq_lens) + head_dim)
    pages = page_layout(
        generator,
        seq_lens,
        num_kv_heads=num_kv_heads,
        tokens_per_page=tokens_per_page,
        head_dim=head_dim,
        dtype=dtype,
        spare_columns=spare_columns,
    )
    if sliding_window:
        for sequence, length in enumerate(seq_lens):  # pages before the window were given back
            pages.block_tables[sequence, : max(0, length - sliding_window) // tokens_per_page] = 1 << 30
    q = randn(generator, len(seq_lens), num_kv_heads * group, head_dim, dtype=dtype)
    with poisoned():
        actual = decode_attention(
            q,
            pages.k_cache,
            pages.v_cache,
            pages.block_tables,
            pages.seq_lens,
            scale=head_dim**-0.5,
            sliding_window=sliding_window,
            **({"architecture": SMALL} | options),
        )
    tables = torch.where(pages.block_tables == 1 << 30, 0, pages.block_tables)
    pages = replace(pages, k_cache=pages.k_cache.nan_to_num(), v_cache=pages.v_cache.nan_to_num())
    expected = decode_attention_reference(
        q,
        pages.k_cache,
        pages.v_cache,
        tables,
        pages.seq_lens,
        scale=head_dim**-0.5,
        sliding_window=sliding_window,
    )
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check([37, 150], head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16, 20])
def test_group_sizes(group: int) -> None:
    check([70, 9], group=group, num_kv_heads=2)


@pytest.mark.parametrize("tokens_per_page", [1, 7, 16, 18, 28, 36, 200])
def test_page_borders(tokens_per_page: int) -> None:
    check([tokens_per_page, tokens_per_page + 1, max(1, tokens_per_page - 1), 130], tokens_per_page=tokens_per_page)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 0])
def test_tile_borders_and_padding_rows(length: int) -> None:
    check([length, 5])


def test_splits_with_skewed_lengths() -> None:
    """The long one is split, the short ones are not, and surplus programs keep out."""
    check([1100, 3, 0, 300], num_kv_heads=2, spare_columns=40)


def test_more_splits_than_tiles_divide_into() -> None:
    """5 tiles in 4 splits are 2 + 2 + 1 + 0: the empty one is -inf, not NaN."""
    generator = torch.Generator().manual_seed(7)
    pages = page_layout(generator, [640], num_kv_heads=1, tokens_per_page=20, head_dim=64, dtype=torch.float32)
    q = randn(generator, 1, 4, 64)
    arguments = (q, pages.k_cache, pages.v_cache, pages.block_tables, pages.seq_lens)
    expected = decode_attention_reference(*_without_nan(arguments), scale=0.2)
    wide = torch.zeros(1, 200, dtype=torch.int32)  # a wide table, so that the grid has room for 9 splits
    wide[:, :32] = pages.block_tables
    for splits in (1, 2, 3, 4, 7, 9):
        with poisoned():
            actual = decode_attention(
                *arguments[:3],
                wide,
                pages.seq_lens,
                scale=0.2,
                num_splits=torch.tensor([splits], dtype=torch.int32),
                architecture=SMALL,
            )
        assert_close(actual, expected, torch.float32)


def _without_nan(arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(each.nan_to_num() if each.dtype.is_floating_point else each for each in arguments)


@pytest.mark.parametrize("sliding_window", [1, 20, 64, 130, 1000])
def test_sliding_window(sliding_window: int) -> None:
    check([200, 64, 7, 129], sliding_window=sliding_window, tokens_per_page=18)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_fp8_cache(head_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    pages = page_layout(generator, [300, 17], num_kv_heads=2, tokens_per_page=18, head_dim=head_dim, dtype=dtype)
    scales = 0.02 + 0.02 * torch.rand(2, 2, generator=generator)
    codes = kv_codes_of(pages, *scales)
    q = randn(generator, 2, 8, head_dim, dtype=dtype)
    options: dict[str, Any] = {"scale": 0.1, "k_scale": scales[0], "v_scale": scales[1]}
    for keys, values in (codes, [code.view(torch.uint8) for code in codes]):
        arguments = (q, keys, values, pages.block_tables, pages.seq_lens)
        with poisoned():
            actual = decode_attention(*arguments, **options, architecture=SMALL)
        assert_close(actual, decode_attention_reference(*arguments, **options), dtype)


def test_offsets_beyond_32_bits() -> None:
    """Page 8 begins 2^31 elements after page 0: page number and stride both fit 32 bits, their product does not."""
    page_stride = 1 << 28
    memory = torch.empty(8 * page_stride + 16 * 64, dtype=torch.float16)  # only what is written takes real memory
    cache = torch.as_strided(memory, (9, 1, 16, 64), (page_stride, 16 * 64, 64, 1))
    generator = torch.Generator().manual_seed(5)
    cache[[1, 8]] = randn(generator, 2, 1, 16, 64, dtype=torch.float16)
    pages = Pages(cache, cache, torch.tensor([[1, 8]], dtype=torch.int32), torch.tensor([30], dtype=torch.int32))
    q = randn(generator, 1, 1, 64, dtype=torch.float16)
    arguments = (q, pages.k_cache, pages.v_cache, pages.block_tables, pages.seq_lens)
    actual = decode_attention(*arguments, scale=0.125, architecture=SMALL)
    assert_close(actual, decode_attention_reference(*arguments, scale=0.125), torch.float16)


def test_a_fixed_split_does_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(6)
    pages = page_layout(generator, [700, 33, 400], num_kv_heads=1, tokens_per_page=16, head_dim=64, dtype=torch.float32)
    q = randn(generator, 3, 2, 64)
    everything = (q, pages.k_cache, pages.v_cache, pages.block_tables, pages.seq_lens)
    together = decode_attention(*everything, scale=0.125, split_tokens=256, architecture=SMALL)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = decode_attention(
            q[rows],
            pages.k_cache,
            pages.v_cache,
            pages.block_tables[rows],
            pages.seq_lens[rows],
            scale=0.125,
            split_tokens=256,
            architecture=SMALL,
        )
        assert torch.equal(alone, together[rows])


def test_split_counts_balance_the_card() -> None:
    q, k_cache = torch.empty(4, 32, 128, dtype=torch.bfloat16), torch.empty(1, 8, 16, 128, dtype=torch.bfloat16)
    block_tables = torch.empty(4, 2048, dtype=torch.int32)
    seq_lens = torch.tensor([32768, 1024, 0, 1], dtype=torch.int32)
    counts = plan_splits(q, k_cache, block_tables, seq_lens, architecture=H200).tolist()
    setting = settings(H200, batch=4, num_q_heads=32, num_kv_heads=8, head_dim=128, element_size=2, max_context=32768)
    assert counts[2:] == [0, 1]
    assert counts[0] > 8 * counts[1] > 0
    assert counts[0] <= setting.max_splits
    programs = 8 * sum(counts)
    assert setting.programs * 0.8 <= programs <= setting.programs * 1.2


def test_settings_by_architecture() -> None:
    shape: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "element_size": 2}
    for architecture in KNOWN:
        alone = settings(architecture, batch=1, max_context=32768, **shape)
        assert 8 * alone.max_splits >= architecture.num_sms  # one sequence fills the card
        full = settings(architecture, batch=256, max_context=32768, **shape)
        assert full.max_splits == 4
        assert settings(architecture, batch=1, max_context=200, **shape).max_splits == 1
    assert (
        settings(A10, batch=1, max_context=32768, **shape).tile < settings(H200, batch=1, max_context=1, **shape).tile
    )
