"""Keys and values as E4M3 codes: written by one operation, read by another, against float caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kernel_cases import assert_close, kv_codes_of, page_layout, randn

from aiexport_edge.kernels import kv_codes
from aiexport_edge.kernels.decode_attention import decode_attention
from aiexport_edge.kernels.paged_attention import paged_attention, paged_attention_reference
from aiexport_edge.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference


def test_codes_saturate_and_round_to_an_eighth() -> None:
    values = torch.linspace(-500, 500, 10_001).view(-1, 1, 1)
    scale = torch.tensor([0.5])
    decoded = kv_codes.decode(kv_codes.encode(values, scale), scale)
    expected = values.clamp(-224, 224)
    torch.testing.assert_close(decoded, expected, rtol=1 / 16, atol=2**-10)


def test_attention_over_codes_is_near_that_over_values() -> None:
    generator = torch.Generator().manual_seed(1)
    pages = page_layout(generator, [70, 9], num_kv_heads=2, tokens_per_page=7, head_dim=32, dtype=torch.float32)
    scales = torch.full((2, 2), 0.02)
    q = randn(generator, 2, 8, 32)
    exact = decode_attention(q, pages.k_cache, pages.v_cache, pages.block_tables, pages.seq_lens, scale=0.2)
    actual = decode_attention(
        q,
        *kv_codes_of(pages, scales[0], scales[1]),
        pages.block_tables,
        pages.seq_lens,
        scale=0.2,
        k_scale=scales[0],
        v_scale=scales[1],
    )
    torch.testing.assert_close(actual, exact, rtol=0.1, atol=0.1)


def test_what_is_written_as_codes_is_what_is_written_as_values() -> None:
    generator = torch.Generator().manual_seed(2)
    qkv = randn(generator, 5, 4 * 16)
    cos_sin = torch.cat((torch.ones(9, 8), torch.zeros(9, 8)), dim=1)
    positions = torch.arange(5).expand(3, 5).contiguous()
    slots = torch.tensor([0, 3, -1, 7, 5])
    values = [torch.zeros(3, 1, 3, 16) for _ in range(2)]
    codes = [torch.zeros(3, 1, 3, 16, dtype=torch.uint8) for _ in range(2)]
    scales = torch.tensor([[0.02], [0.03]])
    heads: dict[str, Any] = {"num_q_heads": 2, "num_kv_heads": 1}
    q = qk_norm_rope(qkv, cos_sin, positions, slots, values[0], values[1], **heads)
    of_codes = qk_norm_rope(
        qkv, cos_sin, positions, slots, codes[0], codes[1], **heads, k_scale=scales[0], v_scale=scales[1]
    )
    torch.testing.assert_close(of_codes, q)
    for written, wanted, scale in zip(codes, values, scales, strict=True):
        torch.testing.assert_close(kv_codes.decode(written, scale), wanted, rtol=1 / 16, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 20, 96, 128])
@pytest.mark.parametrize("window", [0, 50])
def test_attention_over_codes_on_a_processor(dtype: torch.dtype, head_dim: int, window: int) -> None:
    """Prefill and decode, with scales of their own for each head, against the reference; recorded splits too."""
    generator = torch.Generator().manual_seed(head_dim)
    lengths = [150, 2100, 3]
    layout: Any = {"num_kv_heads": 2, "tokens_per_page": 7, "head_dim": head_dim, "dtype": torch.float32}
    pages = page_layout(generator, lengths, **layout)
    scales = torch.tensor([[0.02, 0.03], [0.05, 0.01]])
    codes = kv_codes_of(pages, scales[0], scales[1])
    options: Any = {"scale": 0.2, "sliding_window": window, "k_scale": scales[0], "v_scale": scales[1]}
    for queries in ([1, 1, 1], [20, 5, 3]):
        q = randn(generator, sum(queries), 4, head_dim, dtype=dtype)
        starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
        expected = paged_attention_reference(q, *codes, pages.block_tables, starts, pages.seq_lens, **options)
        actual = paged_attention(q, *codes, pages.block_tables, starts, pages.seq_lens, **options)
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("head_dim", [16, 20, 128])
def test_heads_are_written_as_codes_on_a_processor(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    qkv = 20 * randn(generator, 9, 4 * head_dim)
    qkv[0, 3 * head_dim :] = torch.linspace(-600, 600, head_dim) * 0.03  # v's codes: all sizes, and beyond the largest
    qkv[1, 3 * head_dim :] = torch.linspace(-0.02, 0.02, head_dim) * 0.03  # subnormals
    cos_sin = randn(generator, 9, head_dim)
    positions, slots = torch.arange(9).expand(3, 9).contiguous(), torch.tensor([0, 3, -1, 7, 5, 8, 1, 2, 4])
    scales = torch.tensor([[0.02], [0.03]])
    heads: dict[str, Any] = {"num_q_heads": 2, "num_kv_heads": 1, "k_scale": scales[0], "v_scale": scales[1]}
    written = [torch.zeros(3, 1, 3, head_dim, dtype=torch.uint8) for _ in range(2)]
    expected = [torch.zeros_like(each) for each in written]
    qk_norm_rope(qkv, cos_sin, positions, slots, written[0], written[1], **heads)
    qk_norm_rope_reference(qkv, cos_sin, positions, slots, expected[0], expected[1], **heads)
    assert torch.equal(written[1], expected[1])
    # A key is the sum of two products: a last bit may fall to another code.
    assert (written[0] == expected[0]).float().mean() > 0.99
    torch.testing.assert_close(
        kv_codes.decode(written[0], scales[0]), kv_codes.decode(expected[0], scales[0]), rtol=1 / 7, atol=1e-4
    )
