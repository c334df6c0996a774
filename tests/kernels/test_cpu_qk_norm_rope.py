"""QK norm, rotary embedding and KV write on the CPU: against the reference, which is held to transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.kernel_cases import DTYPES, assert_close, poisoned, randn
from torch import Tensor

from aiexport_edge.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference

NUM_PAGES = 9


@dataclass
class Case:
    """Arguments of one call; two copies of the same cache, which has another layer and holds NaN."""

    arguments: tuple[Tensor, Tensor, Tensor, Tensor]
    options: dict[str, Any]
    caches: tuple[Tensor, Tensor]
    tokens_per_page: int

    def run(self) -> tuple[Tensor, Tensor]:
        """q of the operation and of the reference."""
        (k, v), (expected_k, expected_v) = ((cache[:, 1, 0], cache[:, 1, 1]) for cache in self.caches)
        with poisoned():
            q = qk_norm_rope(*self.arguments, k, v, **self.options)
        return q, qk_norm_rope_reference(*self.arguments, expected_k, expected_v, **self.options)


def case(
    *,
    num_tokens: int = 23,
    num_q_heads: int = 6,
    num_kv_heads: int = 3,
    head_dim: int = 64,
    rot_dim: int = 64,
    tokens_per_page: int = 7,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    norm: bool = True,
    mrope_section: tuple[int, ...] | None = None,
) -> Case:
    """Random tokens in random slots, every fifth in none."""
    generator = torch.Generator().manual_seed(head_dim + num_tokens)
    qkv = randn(generator, num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    positions = torch.randint(0, 50, (3, num_tokens), generator=generator)
    slots = tokens_per_page + torch.randperm((NUM_PAGES - 1) * tokens_per_page, generator=generator)[:num_tokens]
    slots[::5] = -1
    shape = (NUM_PAGES, 2, 2, num_kv_heads, tokens_per_page, head_dim)
    options = {
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "q_weight": randn(generator, head_dim, dtype=dtype) if norm else None,
        "k_weight": randn(generator, head_dim, dtype=dtype) if norm else None,
        "mrope_section": mrope_section,
    }
    cache = torch.full(shape, float("nan"), dtype=kv_dtype or dtype)
    arguments = (qkv, randn(generator, 50, rot_dim), positions, slots)
    return Case(arguments, options, (cache, cache.clone()), tokens_per_page)


def check(case: Case) -> None:
    """q, k and v as the reference has them, and not one number more in the cache."""
    before = [tensor.clone() for tensor in case.arguments]
    q, expected = case.run()
    assert q.dtype == expected.dtype
    assert_close(q, expected, q.dtype)
    written, expected_cache = case.caches
    assert torch.equal(written.isnan(), expected_cache.isnan())
    assert_close(written.nan_to_num(), expected_cache.nan_to_num(), written.dtype)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(case.arguments, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "rot_dim"), [(8, 8), (64, 64), (80, 40), (96, 96), (128, 128), (256, 64), (64, 6)]
)
def test_against_the_reference(head_dim: int, rot_dim: int, dtype: torch.dtype) -> None:
    check(case(head_dim=head_dim, rot_dim=rot_dim, dtype=dtype))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("mrope_section", [None, (12, 10, 10), (22, 5, 5)])
def test_norm_and_axes(norm: bool, mrope_section: tuple[int, ...] | None) -> None:
    check(case(norm=norm, mrope_section=mrope_section))


def test_norm_of_keys_alone() -> None:
    only_keys = case()
    only_keys.options["q_weight"] = None
    check(only_keys)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (16, 1), (5, 5), (32, 8)])
@pytest.mark.parametrize("tokens_per_page", [1, 16, 28])
def test_heads_and_pages(num_q_heads: int, num_kv_heads: int, tokens_per_page: int) -> None:
    check(
        case(
            num_tokens=min(23, 8 * tokens_per_page),
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=16,
            rot_dim=16,
            tokens_per_page=tokens_per_page,
        )
    )


def test_cache_of_another_dtype() -> None:
    check(case(dtype=torch.float32, kv_dtype=torch.bfloat16))
    check(case(dtype=torch.bfloat16, kv_dtype=torch.float16))


def test_no_tokens() -> None:
    check(case(num_tokens=0))


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    whole = case(num_tokens=600, tokens_per_page=100, head_dim=40, rot_dim=40, dtype=dtype)
    qkv, cos_sin, positions, slots = whole.arguments
    cache, parts_cache = whole.caches
    q = qk_norm_rope(qkv, cos_sin, positions, slots, cache[:, 1, 0], cache[:, 1, 1], **whole.options)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(600, generator=generator)
    start = 0
    while start < 600:
        rows = order[start : start + int(torch.randint(1, 90, (), generator=generator))]
        part = qk_norm_rope(
            qkv[rows],
            cos_sin,
            positions[:, rows],
            slots[rows],
            parts_cache[:, 1, 0],
            parts_cache[:, 1, 1],
            **whole.options,
        )
        assert torch.equal(part, q[rows])
        start += len(rows)
    assert torch.equal(cache.nan_to_num(), parts_cache.nan_to_num())


def test_reference_rotates_as_transformers_does() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    one = case(head_dim=32, rot_dim=32, num_tokens=11)
    qkv, _, positions, slots = one.arguments
    angles = torch.outer(torch.arange(50.0), 1e4 ** -(torch.arange(0, 32, 2) / 32))
    cache = one.caches[0]
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    q = qk_norm_rope_reference(qkv, cos_sin, positions, slots, cache[:, 0, 0], cache[:, 0, 1], **one.options)

    norms = [Qwen3RMSNorm(32, eps=1e-6) for _ in range(2)]
    for norm, weight in zip(norms, (one.options["q_weight"], one.options["k_weight"]), strict=True):
        norm.weight.data = weight
    heads = qkv.view(11, 12, 32)
    cos, sin = (torch.cat((table, table), dim=1)[positions[0]][None] for table in (angles.cos(), angles.sin()))
    with torch.no_grad():
        rotated = apply_rotary_pos_emb(
            norms[0](heads[:, :6]).transpose(0, 1)[None], norms[1](heads[:, 6:9]).transpose(0, 1)[None], cos, sin
        )
    expected_q, expected_k = (tensor[0].transpose(0, 1) for tensor in rotated)
    assert_close(q, expected_q, torch.float32)
    for token in range(11):
        if slots[token] >= 0:
            page, offset = divmod(int(slots[token]), one.tokens_per_page)
            assert_close(cache[page, 0, 0, :, offset], expected_k[token], torch.float32)
            assert torch.equal(cache[page, 0, 1, :, offset], heads[token, 9:])


def test_reference_interleaves_axes_as_qwen3_vl_does() -> None:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    section = [6, 5, 5]
    rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}
    embedding = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=32, rope_parameters=rope_parameters))
    one = case(head_dim=32, rot_dim=32, num_tokens=9, norm=False, mrope_section=tuple(section))
    qkv, _, positions, slots = one.arguments
    angles = torch.outer(torch.arange(50.0), embedding.inv_freq)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    cache = one.caches[0]
    q = qk_norm_rope_reference(qkv, cos_sin, positions, slots, cache[:, 0, 0], cache[:, 0, 1], **one.options)

    first, second = qkv.view(9, 12, 32)[:, :6].chunk(2, dim=-1)
    cos, sin = (table[0, :, None, :16] for table in embedding(q, positions[:, None]))
    assert_close(q, torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1), torch.float32)
