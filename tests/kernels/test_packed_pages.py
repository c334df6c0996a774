"""Attention over caches that are halves of one tensor, as vLLM lays out a layer: a head's key before its value.

Where there is a card, on it.
"""

from __future__ import annotations

import pytest
import torch

from aiexport_edge.kernels.decode_attention import decode_attention, decode_attention_reference
from aiexport_edge.kernels.paged_attention import paged_attention, paged_attention_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_major", [True, False])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 128), (32, 64), (128, 64)])
def test_halves_of_one_tensor_are_read_in_place(
    block_size: int, head_dim: int, head_major: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    num_blocks, num_q_heads, num_kv_heads, lengths = 64, 8, 2, [1, 5, block_size, 3 * block_size + 7, 0]
    order = (num_blocks, num_kv_heads, block_size) if head_major else (num_blocks, block_size, num_kv_heads)
    packed = torch.randn(*order, 2 * head_dim, device=DEVICE, dtype=dtype)
    kv_cache = packed if head_major else packed.transpose(1, 2)
    k_cache, v_cache = kv_cache[..., :head_dim], kv_cache[..., head_dim:]
    blocks = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32)[:20].view(5, 4)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    scale, tolerance = head_dim**-0.5, TOLERANCES[dtype]
    q = torch.randn(len(lengths), num_q_heads, head_dim, device=DEVICE, dtype=dtype)
    decoded = decode_attention(q, k_cache, v_cache, blocks, seq_lens, scale=scale)
    expected = decode_attention_reference(q, k_cache.contiguous(), v_cache.contiguous(), blocks, seq_lens, scale=scale)
    expected[-1] = 0  # a row of padding
    torch.testing.assert_close(decoded, expected, atol=tolerance, rtol=tolerance)
    news = [1, 3, block_size - 2, block_size + 9, 0]
    starts = torch.tensor([0, *torch.tensor(news).cumsum(0)], dtype=torch.int32, device=DEVICE)
    q = torch.randn(sum(news), num_q_heads, head_dim, device=DEVICE, dtype=dtype)
    for window in (0, 11):
        attended = paged_attention(q, k_cache, v_cache, blocks, starts, seq_lens, scale=scale, sliding_window=window)
        expected = paged_attention_reference(
            q,
            k_cache.contiguous(),
            v_cache.contiguous(),
            blocks,
            starts,
            seq_lens,
            scale=scale,
            sliding_window=window,
        )
        torch.testing.assert_close(attended, expected, atol=tolerance, rtol=tolerance)
