"""Decodes on a CPU by a plan: against the reference; with the same bits as a prefill where that is asked for."""

from __future__ import annotations

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, page_layout, poisoned, randn

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
