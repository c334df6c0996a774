"""What the kernel tests share: tolerances by dtype, poisoned outputs, random page layouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from aiexport_edge.kernels import kv_codes

# One rounding of the output and, for attention, of the weights before their product with the values.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal within `TOLERANCE`, absolute and relative; no NaN left of the poison."""
    torch.testing.assert_close(actual.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=generator).to(dtype)


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` and `torch.empty_like` return NaN (floats) or the most negative number (integers) everywhere."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).min if tensor.dtype.is_signed else 0xAA)

    with (
        mock.patch.object(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs))),
        mock.patch.object(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs))),
    ):
        yield


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys and values of a few sequences in shuffled pages. Slots that no sequence uses hold NaN."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor


def page_layout(
    generator: torch.Generator,
    seq_lens: list[int],
    *,
    num_kv_heads: int,
    tokens_per_page: int,
    head_dim: int,
    dtype: torch.dtype,
    shared_pages: int = 0,
    spare_columns: int = 0,
) -> Pages:
    """Caches as a runner lays them out: a strided view of one of two layers, page 0 unused.

    The first `shared_pages` pages of all sequences are the same. `block_tables` has `spare_columns` columns more than
    the longest sequence needs; entries past a sequence's end point far outside of the cache.
    """
    counts = [-(-length // tokens_per_page) for length in seq_lens]
    num_pages = 1 + shared_pages + sum(max(0, count - shared_pages) for count in counts)
    order = (1 + torch.randperm(num_pages - 1, generator=generator)).tolist()
    common, rest = order[:shared_pages], iter(order[shared_pages:])
    memory = torch.full((num_pages, 2, 2, num_kv_heads, tokens_per_page, head_dim), float("nan"), dtype=dtype)
    k_cache, v_cache = memory[:, 1, 0], memory[:, 1, 1]
    block_tables = torch.full((len(seq_lens), max([1, *counts]) + spare_columns), 1 << 30, dtype=torch.int32)
    for sequence, (length, count) in enumerate(zip(seq_lens, counts, strict=True)):
        pages = [*common, *(next(rest) for _ in range(count - shared_pages))][:count]
        block_tables[sequence, :count] = torch.tensor(pages, dtype=torch.int32)
        for index, page in enumerate(pages):
            used = min(tokens_per_page, length - index * tokens_per_page)
            shape = (num_kv_heads, used, head_dim)
            if index >= shared_pages or sequence == 0:
                k_cache[page, :, :used] = randn(generator, *shape, dtype=dtype)
                v_cache[page, :, :used] = randn(generator, *shape, dtype=dtype)
    return Pages(k_cache, v_cache, block_tables, torch.tensor(seq_lens, dtype=torch.int32))


def kv_codes_of(pages: Pages, k_scale: torch.Tensor, v_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches as E4M3 codes, scales float32 [Hkv]. Slots that no sequence uses hold the code of NaN."""
    k_codes, v_codes = (
        kv_codes.encode(cache.transpose(1, 2), scale).transpose(1, 2)
        for cache, scale in ((pages.k_cache, k_scale), (pages.v_cache, v_scale))
    )
    return k_codes, v_codes
