"""Attention over pages on the CPU: against the reference, and each row by itself bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.kernel_cases import DTYPES, Pages, assert_close, page_layout, poisoned, randn
from torch import Tensor

from aiexport_edge.kernels import threads
from aiexport_edge.kernels.cpu.attention_plan import SPLIT
from aiexport_edge.kernels.paged_attention import paged_attention, paged_attention_reference

MIXED = (
    [1, 0, 40, 7, 1],
    [70, 3, 40, 131, 1],
)  # queries and lengths: decodes, nothing, a prompt, a chunk, a first token


def starts(query_lens: list[int]) -> Tensor:
    """query_start_loc of these lengths."""
    return torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)


def check(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    tokens_per_page: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    sliding_window: int = 0,
    padding: int = 0,
) -> None:
    """The operation against the reference, over pages with NaN wherever no token lies."""
    generator = torch.Generator().manual_seed(head_dim)
    pages = page_layout(
        generator,
        seq_lens,
        num_kv_heads=num_kv_heads,
        tokens_per_page=tokens_per_page,
        head_dim=head_dim,
        dtype=kv_dtype or dtype,
        spare_columns=2,
    )
    q = randn(generator, sum(query_lens) + padding, num_q_heads, head_dim, dtype=dtype)
    arguments = (q, pages.k_cache, pages.v_cache, pages.block_tables, starts(query_lens), pages.seq_lens)
    copies = [tensor.clone() for tensor in arguments]
    options = {"scale": head_dim**-0.5, "sliding_window": sliding_window}
    with poisoned():
        out = paged_attention(*arguments, **options)
    assert out.dtype == dtype
    assert_close(out, paged_attention_reference(*arguments, **options), dtype)
    assert not out[sum(query_lens) :].any()
    assert all(
        torch.equal(tensor.nan_to_num(), copy.nan_to_num()) for tensor, copy in zip(arguments, copies, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(*MIXED, head_dim=head_dim, dtype=dtype, tokens_per_page=5)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (7, 7), (6, 2), (10, 2), (8, 1), (16, 1), (70, 1)])
def test_groups_of_query_heads(num_q_heads: int, num_kv_heads: int) -> None:
    check(*MIXED, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=16, tokens_per_page=28)


@pytest.mark.parametrize("tokens_per_page", [1, 2, 7, 16, 28, 36, 64, 100, 500])
def test_page_sizes(tokens_per_page: int) -> None:
    check(*MIXED, tokens_per_page=tokens_per_page, head_dim=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliding_window", [1, 2, 33, 64, 100, 1000])
def test_sliding_windows(sliding_window: int, dtype: torch.dtype) -> None:
    check([1, 150, 3], [200, 150, 129], sliding_window=sliding_window, head_dim=32, dtype=dtype, tokens_per_page=7)


@pytest.mark.parametrize("sliding_window", [0, 700])
def test_long_sequences_in_splits(sliding_window: int) -> None:
    check(
        [1, 3],
        [2 * SPLIT + 5, SPLIT + 1],
        head_dim=8,
        num_kv_heads=1,
        tokens_per_page=36,
        sliding_window=sliding_window,
    )


def test_cache_of_another_dtype() -> None:
    check(*MIXED, dtype=torch.float32, kv_dtype=torch.bfloat16)
    check(*MIXED, dtype=torch.bfloat16, kv_dtype=torch.float16)


def test_padding_rows_are_zero() -> None:
    check(*MIXED, padding=3)
    check([0, 0], [5, 9], padding=2)
    check([1, 1, 2, 1], [5, 0, 70, 0])


def test_lengths_around_blocks() -> None:
    lengths = [1, 31, 32, 33, 63, 64, 65, 127, 128, 129]
    check([1] * 10, lengths, head_dim=16)
    check(lengths, lengths, head_dim=16, tokens_per_page=10)


def test_large_scores() -> None:
    """Weights of exactly 0 and 1, as a row's own largest score decides."""
    generator = torch.Generator().manual_seed(0)
    pages = page_layout(generator, [90], num_kv_heads=1, tokens_per_page=9, head_dim=16, dtype=torch.float32)
    arguments = (
        1e4 * randn(generator, 90, 1, 16),
        pages.k_cache,
        pages.v_cache,
        pages.block_tables,
        starts([90]),
        pages.seq_lens,
    )
    assert_close(
        paged_attention(*arguments, scale=10.0), paged_attention_reference(*arguments, scale=10.0), torch.float32
    )


def rows_of(q: Tensor, pages: Pages, spans: list[tuple[int, int]], sliding_window: int) -> Tensor:
    """Attention of queries start .. end - 1 of the one sequence, for each span as if it were a sequence of its own."""
    return paged_attention(
        torch.cat([q[start:end] for start, end in spans]),
        pages.k_cache,
        pages.v_cache,
        pages.block_tables.expand(len(spans), -1),
        starts([end - start for start, end in spans]),
        torch.tensor([end for _, end in spans], dtype=torch.int32),
        scale=0.3,
        sliding_window=sliding_window,
    )


@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "head_dim", "tokens_per_page", "dtype", "sliding_window"),
    [
        (1, 1, 16, 5, torch.float32, 0),
        (4, 2, 40, 28, torch.bfloat16, 0),
        (5, 1, 64, 16, torch.float32, 100),
        (8, 1, 8, 7, torch.float16, 0),
    ],
)
def test_a_row_is_the_same_in_every_chunk_batch_and_thread(
    monkeypatch: pytest.MonkeyPatch,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    tokens_per_page: int,
    dtype: torch.dtype,
    sliding_window: int,
) -> None:
    monkeypatch.setattr(threads, "MIN_SHARED_NANOSECONDS", 0.0)
    length = SPLIT + 150
    generator = torch.Generator().manual_seed(6)
    pages = page_layout(
        generator,
        [length],
        num_kv_heads=num_kv_heads,
        tokens_per_page=tokens_per_page,
        head_dim=head_dim,
        dtype=dtype,
    )
    q = randn(generator, length, num_q_heads, head_dim, dtype=dtype)
    before = threads.num_threads()
    try:
        threads.set_num_threads(1)
        whole = rows_of(q, pages, [(0, length)], sliding_window)
        for num_threads in (1, 3):
            threads.set_num_threads(num_threads)
            assert torch.equal(rows_of(q, pages, [(0, length)], sliding_window), whole)
            cuts = [0, *(torch.randperm(length - 1, generator=generator)[:40] + 1).sort().values.tolist(), length]
            spans = [(cuts[i], cuts[i + 1]) for i in torch.randperm(41, generator=generator).tolist()]
            for size in (1, 2, 6):
                for some in [spans[i : i + size] for i in range(0, 41, max(4, size))]:
                    expected = torch.cat([whole[start:end] for start, end in some])
                    assert torch.equal(rows_of(q, pages, some, sliding_window), expected)
            places = [0, 1, 62, 63, 64, 65, SPLIT - 1, SPLIT, SPLIT + 1, length - 1]
            decodes = rows_of(q, pages, [(place, place + 1) for place in places], sliding_window)
            assert torch.equal(decodes, whole[places])
            for place in (64, SPLIT, length - 1):  # few units of work: sequences are shared out by splits
                assert torch.equal(rows_of(q, pages, [(place, place + 1)], sliding_window), whole[place : place + 1])
    finally:
        threads.set_num_threads(before)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """A page more than 2^31 items into the cache, which is a file with holes: only what is touched exists."""
    head_dim, tokens_per_page, num_pages = 64, 16, 1_050_000
    shape = (num_pages, 2, 1, tokens_per_page, head_dim)
    num_items = num_pages * 2 * tokens_per_page * head_dim
    assert num_items > 1 << 31
    memory = torch.from_file(str(tmp_path / "cache"), shared=True, size=num_items, dtype=torch.bfloat16)
    cache = memory.view(shape)
    generator = torch.Generator().manual_seed(7)
    tables = torch.tensor([[num_pages - 1, 3, num_pages - 2]], dtype=torch.int32)
    for page in tables[0].tolist():
        cache[page] = randn(generator, *shape[1:], dtype=torch.bfloat16)
    q = randn(generator, 5, 2, head_dim, dtype=torch.bfloat16)
    arguments = (q, cache[:, 0], cache[:, 1], tables, starts([5]), torch.tensor([44], dtype=torch.int32))
    out, expected = paged_attention(*arguments, scale=0.1), paged_attention_reference(*arguments, scale=0.1)
    assert_close(out, expected, torch.bfloat16)
