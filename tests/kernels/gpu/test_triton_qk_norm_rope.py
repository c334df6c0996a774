"""QK norm + RoPE + KV write in the interpreter against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kernel_cases import DTYPES, TOLERANCE, assert_close, poisoned, randn

from aiexport_edge.kernels.gpu.qk_norm_rope import qk_norm_rope
from aiexport_edge.kernels.qk_norm_rope import qk_norm_rope_reference

NUM_PAGES = 6


def caches(num_kv_heads: int, tokens_per_page: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """k and v views of one layer of two, as the runner makes them, all poison."""
    memory = torch.zeros((NUM_PAGES, 2, 2, num_kv_heads, tokens_per_page, head_dim), dtype=dtype)
    memory.fill_(float("nan") if dtype.is_floating_point else 0x7F)
    return memory, memory[:, 1, 0], memory[:, 1, 1]


def run_both(
    *,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rot_dim: int,
    tokens_per_page: int,
    dtype: torch.dtype,
    normed: bool,
    mrope_section: tuple[int, int, int] | None,
    quantized: bool,
) -> None:
    generator = torch.Generator().manual_seed(num_tokens + head_dim)
    qkv = randn(generator, num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angles = 3 * torch.rand(50, rot_dim // 2, generator=generator)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.randint(0, 50, (3, num_tokens), generator=generator)
    slots = torch.randperm(NUM_PAGES * tokens_per_page, generator=generator)[:num_tokens]
    slots[::3] = -1
    slots[-1] = NUM_PAGES * tokens_per_page - 1
    weights = [(1 + 0.3 * randn(generator, head_dim)).to(dtype) if normed else None for _ in range(2)]
    options: dict[str, Any] = {
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "q_weight": weights[0],
        "k_weight": weights[1],
        "mrope_section": mrope_section,
    }
    cache_dtype = torch.uint8 if quantized else dtype
    expected_memory, *expected = caches(num_kv_heads, tokens_per_page, head_dim, cache_dtype)
    memory, *actual = caches(num_kv_heads, tokens_per_page, head_dim, cache_dtype)
    if quantized:
        scales = 0.01 + 0.01 * torch.rand(2, num_kv_heads, generator=generator)
        options |= {"k_scale": scales[0], "v_scale": scales[1]}
    expected_q = qk_norm_rope_reference(qkv, cos_sin, positions, slots, *expected, **options)
    with poisoned():
        q = qk_norm_rope(qkv, cos_sin, positions, slots, *actual, **options)
    assert_close(q, expected_q, dtype)
    if quantized:
        memory, expected_memory = (each.view(torch.float8_e4m3fn).float() for each in (memory, expected_memory))
        same = (memory == expected_memory) | expected_memory.isnan()
        assert same.float().mean() > 0.995
    assert torch.equal(memory.isnan(), expected_memory.isnan())  # nothing else was touched
    rtol, atol = (1 / 8, 2**-9) if quantized else (TOLERANCE[dtype], TOLERANCE[dtype])
    torch.testing.assert_close(memory, expected_memory, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "rot_dim", "tokens_per_page"),
    [
        ((4, 2), 128, 128, 16),
        ((16, 8), 64, 64, 18),
        ((3, 1), 80, 80, 7),
        ((5, 5), 96, 96, 28),
        ((2, 1), 128, 32, 1),
        ((4, 1), 64, 48, 36),
        ((2, 2), 256, 64, 5),
    ],
    ids=str,
)
def test_heads_and_layouts(
    heads: tuple[int, int], head_dim: int, rot_dim: int, tokens_per_page: int, dtype: torch.dtype
) -> None:
    run_both(
        num_tokens=4,
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        rot_dim=rot_dim,
        tokens_per_page=tokens_per_page,
        dtype=dtype,
        normed=True,
        mrope_section=None,
        quantized=False,
    )


@pytest.mark.parametrize("mrope_section", [None, (24, 20, 20), (8, 28, 28), (44, 10, 10)], ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_three_axes(mrope_section: tuple[int, int, int] | None, normed: bool) -> None:
    run_both(
        num_tokens=20,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=128,
        rot_dim=128,
        tokens_per_page=11,
        dtype=torch.bfloat16,
        normed=normed,
        mrope_section=mrope_section,
        quantized=False,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_fp8_cache(head_dim: int, dtype: torch.dtype) -> None:
    run_both(
        num_tokens=9,
        num_q_heads=6,
        num_kv_heads=3,
        head_dim=head_dim,
        rot_dim=head_dim,
        tokens_per_page=13,
        dtype=dtype,
        normed=True,
        mrope_section=None,
        quantized=True,
    )


def test_one_token() -> None:
    run_both(
        num_tokens=1,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rot_dim=128,
        tokens_per_page=16,
        dtype=torch.bfloat16,
        normed=True,
        mrope_section=(24, 20, 20),
        quantized=False,
    )
