"""The pool's size and layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aiexport_edge.engine.core.kv_memory import (
    KVMemory,
    ModelNeed,
    PoolShape,
    available_memory,
    control_group_memory,
    pool_shape,
)
from aiexport_edge.engine.models.config import ModelError

GIB = 1 << 30
SMALL, LARGE = ModelNeed("small", 100, 2000), ModelNeed("large", 1000, 500)


def test_auto_pages_hold_sixteen_tokens_of_the_largest_model() -> None:
    shape = pool_shape([SMALL, LARGE], page_bytes=0, pool_bytes=0, max_num_running=4, available_bytes=GIB)
    assert shape.page_bytes == 16000
    assert shape.tokens_per_page == (160, 16)
    assert shape.num_pages == 32 * 4 + 1  # four full contexts of the large model, and page 0


def test_pages_are_rounded_up_to_cache_lines() -> None:
    shape = pool_shape([SMALL, LARGE], page_bytes=1001, pool_bytes=0, max_num_running=1, available_bytes=GIB)
    assert (shape.page_bytes, shape.tokens_per_page) == (1024, (10, 1))


def test_an_auto_pool_is_bounded_by_memory_but_holds_a_context() -> None:
    needs = [ModelNeed("m", 64, 1 << 20)]
    shape = pool_shape(needs, page_bytes=0, pool_bytes=0, max_num_running=1000, available_bytes=100 * GIB)
    assert shape.num_pages * shape.page_bytes == 4 * GIB
    shape = pool_shape(needs, page_bytes=0, pool_bytes=0, max_num_running=1000, available_bytes=GIB)
    assert shape.num_pages * shape.page_bytes == GIB // 4
    shape = pool_shape(needs, page_bytes=0, pool_bytes=0, max_num_running=1000, available_bytes=100 << 20)
    assert shape.num_pages == (1 << 20) // 16 + 2  # one full context is more than a quarter, and less than all
    shape = pool_shape(needs, page_bytes=0, pool_bytes=0, max_num_running=1000, available_bytes=40 << 20)
    assert shape.num_pages * shape.page_bytes == 30 << 20  # not even that: shorter requests are served


def test_a_pool_of_given_size_is_taken_as_it_is() -> None:
    shape = pool_shape([LARGE], page_bytes=0, pool_bytes=200_000, max_num_running=4, available_bytes=0)
    assert shape.num_pages == 200_000 // 16000


@pytest.mark.parametrize(
    ("page_bytes", "pool_bytes", "available", "complaint"),
    [
        (64, 0, GIB, "page_bytes is 64, but one token of model large takes 1000"),
        (0, 40_000, GIB, "pool_bytes is enough for 2 pages of 16000 bytes; at least 3 are needed"),
        (0, 0, 60_000, "the memory that is free is enough for 2 pages of 16000 bytes"),
    ],
)
def test_sizes_that_are_too_small(page_bytes: int, pool_bytes: int, available: int, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        pool_shape(
            [SMALL, LARGE],
            page_bytes=page_bytes,
            pool_bytes=pool_bytes,
            max_num_running=4,
            available_bytes=available,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_fill_a_page_and_never_leave_it(dtype: torch.dtype) -> None:
    num_layers, num_kv_heads, tokens, head_dim = 3, 2, 5, 6
    token_bytes = num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize
    page_bytes = -(-token_bytes * tokens // 64) * 64
    memory = KVMemory(PoolShape(page_bytes, 4, (tokens,)), torch.device("cpu"))
    layers = memory.layers(0, num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    assert memory.bytes.data_ptr() % 64 == 0
    assert not memory.bytes.any()
    for k_cache, v_cache in layers:
        for cache in (k_cache, v_cache):
            assert cache.shape == (4, num_kv_heads, tokens, head_dim)
            assert cache.stride(-1) == 1
            cache[2] += 1
    ones = memory.bytes.view(dtype).view(4, -1).float().sum(dim=1)
    assert ones.tolist() == [0, 0, token_bytes * tokens // dtype.itemsize, 0]  # each element once: no overlap
    assert int(memory.bytes.view(dtype).max()) == 1


def test_available_memory_is_some_and_not_more_than_there_is() -> None:
    assert 1 << 20 < available_memory() < 1 << 50


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    def group(path: str, limit: str, current: int, inactive_file: int) -> None:
        directory = tmp_path / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{current}\n")
        (directory / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\nactive_file 9\n")

    group("system.slice", "1000", 300, 50)
    group("system.slice/edge.service", "max", 200, 20)
    assert control_group_memory("0::/system.slice/edge.service\n", tmp_path) == [750]
    group("system.slice/edge.service", "400", 200, 20)
    assert control_group_memory("1:cpu:/x\n0::/system.slice/edge.service\n", tmp_path) == [220, 750]
    assert control_group_memory("0::/\n", tmp_path) == []
    assert control_group_memory("4:memory:/old\n", tmp_path) == []
    group("", "500", 100, 0)  # as a container sees it
    assert control_group_memory("0::/\n", tmp_path) == [400]
