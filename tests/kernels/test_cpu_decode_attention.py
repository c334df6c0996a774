"""Decodes on a CPU by a plan: against the reference; with the same bits as a prefill where that is asked for."""

from __future__ import annotations

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, page_layout, poisoned, randn

from aiexport_edge.kernels import threads
from aiexport_edge.kernels.cpu.attention import AttentionPlan
from aiexport_edge.kernels.cpu.attention_plan import HEADER_SIZE, NUM_RECORDS, RECORD_SIZE, SHARED
from aiexport_edge.kernels.decode_attention import decode_attention, decode_attention_reference, plan_decode
from aiexport_edge.kernels.paged_attention import paged_attention

LENGTHS = [1, 63, 64, 65, 2, 130, 3000]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliding_window", [0, 50])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "head_dim"), [(4, 2, 128), (3, 1, 64), (4, 4, 32), (8, 1, 80)])
def test_planned_decodes(
    num_q_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    pages = page_layout(
        generator,
        LENGTHS,
        num_kv_heads=num_kv_heads,
        tokens_per_page=12,
        head_dim=head_dim,
        dtype=dtype,
        spare_columns=2,
    )
    q = randn(generator, len(LENGTHS), num_q_heads, head_dim, dtype=dtype)
    for count in (len(LENGTHS), 1):  # one sequence of 3000 positions is shared out by splits where there are threads
        rows = slice(len(LENGTHS) - count, None)
        arguments = (q[rows], pages.k_cache, pages.v_cache, pages.block_tables[rows], pages.seq_lens[rows])
        scale = head_dim**-0.5
        plan = plan_decode(arguments[0], arguments[1], *arguments[3:], sliding_window=sliding_window)
        expected = decode_attention_reference(*arguments, scale=scale, sliding_window=sliding_window)
        for batch_invariant in (False, True):
            with poisoned():
                out = decode_attention(
                    *arguments, scale=scale, sliding_window=sliding_window, plan=plan, batch_invariant=batch_invariant
                )
            assert_close(out, expected, dtype)
        starts = torch.arange(count + 1, dtype=torch.int32)
        prefilled = paged_attention(
            *arguments[:4], starts, arguments[4], scale=scale, sliding_window=sliding_window, batch_invariant=True
        )
        assert torch.equal(out, prefilled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_what_sequences_share_is_read_once_and_gives_the_same_bits(
    dtype: torch.dtype, batch_invariant: bool, num_threads: int
) -> None:
    """As each sequence by itself. Two prefixes, one past a split and one that ends in it, and one of nobody else's."""
    generator = torch.Generator().manual_seed(1)
    tokens_per_page, num_kv_heads, group, head_dim = 28, 2, 2, 64
    shared, lengths = [2200, 2200, 2200, 0, 300, 300], [2201, 2590, 4200, 77, 350, 301]
    shared += [300] * 12
    lengths += [400 + number for number in range(12)]
    pages = [-(-length // tokens_per_page) for length in lengths]
    tables = torch.zeros((len(lengths), max(pages)), dtype=torch.int32)
    free = (torch.randperm(sum(pages), generator=generator) + 1).tolist()
    for number, count in enumerate(pages):
        tables[number, :count] = torch.tensor([free.pop() for _ in range(count)])
        if number and shared[number] == shared[number - 1]:
            common = shared[number] // tokens_per_page
            tables[number, :common] = tables[number - 1, :common]
    shape = (sum(pages) + 1, num_kv_heads, tokens_per_page, head_dim)
    keys, values = randn(generator, *shape).to(dtype), randn(generator, *shape).to(dtype)
    q = randn(generator, len(lengths), num_kv_heads * group, head_dim).to(dtype)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    before = threads.num_threads()
    try:
        threads.set_num_threads(num_threads)
        plan = plan_decode(q, keys, tables, seq_lens)
        out = decode_attention(q, keys, values, tables, seq_lens, scale=0.2, plan=plan, batch_invariant=batch_invariant)
        alone = [
            decode_attention(
                q[i : i + 1],
                keys,
                values,
                tables[i : i + 1],
                seq_lens[i : i + 1],
                scale=0.2,
                plan=plan_decode(q[i : i + 1], keys, tables[i : i + 1], seq_lens[i : i + 1]),
                batch_invariant=batch_invariant,
            )
            for i in range(len(lengths))
        ]
    finally:
        threads.set_num_threads(before)
    assert torch.equal(out, torch.cat(alone))
    assert isinstance(plan, AttentionPlan)
    records = plan.records[HEADER_SIZE:].view(-1, RECORD_SIZE)[: plan.header[NUM_RECORDS]]
    assert records[:, SHARED].max() == 2176
    assert records.shape[0] < len(lengths) // 2
