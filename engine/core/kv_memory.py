"""The bytes behind the page pool: how many pages there are, and each model's view of them.

Owns one block of memory, cut into pages of equal bytes that any model can use. Who holds which page is `pages.py`'s;
here a page is only an offset. A model fits `page_bytes // kv_bytes_per_token` of its tokens into a page:

    page    | layer 0: k [kv head, token, dim], v [kv head, token, dim] | layer 1: … | … | unused rest |
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aiexport_edge.engine.models.config import ModelError

ALIGNMENT = 64  # bytes: a page begins on a cache line
AUTO_TOKENS_PER_PAGE = 16  # of the model with the most bytes per token
AUTO_MOST_BYTES = 4 << 30
AUTO_SHARE, AUTO_LARGEST_SHARE = 0.25, 0.75  # of the memory that is free
FEWEST_PAGES = 3
GRAPH_BYTES = 512 << 20  # captured launches, and libraries that are loaded when first used


@dataclass(frozen=True, slots=True)
class ModelNeed:
    """What one model asks of the pool."""

    name: str
    kv_bytes_per_token: int
    context_window: int


@dataclass(frozen=True, slots=True)
class PoolShape:
    """Page 0 is never handed out: padding rows write there."""

    page_bytes: int
    num_pages: int
    tokens_per_page: tuple[int, ...]


def pool_shape(
    needs: Sequence[ModelNeed], *, page_bytes: int, pool_bytes: int, max_num_running: int, available_bytes: int
) -> PoolShape:
    """Choose what is 0 (auto) of `page_bytes` and `pool_bytes`.

    A page is rounded up to 64 bytes; auto holds 16 tokens of the model with the most bytes per token. An auto pool
    takes what `max_num_running` full contexts need, at most 4 GiB and a quarter of `available_bytes`; where that is
    less than one full context, it takes one, up to three quarters of `available_bytes`. A pool that holds less serves
    shorter requests only (`Scheduler.capacity_tokens`). Raises ModelError where it would hold next to nothing.
    """
    page_bytes, tokens_per_page = _page_shape(needs, page_bytes)
    source = "pool_bytes"
    if not pool_bytes:
        source = "the memory that is free"
        full_context = max(
            -(-need.context_window // tokens) for need, tokens in zip(needs, tokens_per_page, strict=True)
        )
        wanted = min(AUTO_SHARE * available_bytes, AUTO_MOST_BYTES, (full_context * max_num_running + 1) * page_bytes)
        fewest = min(AUTO_LARGEST_SHARE * available_bytes, (full_context + 2) * page_bytes)
        pool_bytes = int(max(wanted, fewest))
    num_pages = pool_bytes // page_bytes
    if num_pages < FEWEST_PAGES:
        raise ModelError(
            f"{source} is enough for {num_pages} pages of {page_bytes} bytes; at least {FEWEST_PAGES} are needed"
        )
    return PoolShape(page_bytes, num_pages, tokens_per_page)


def smallest_shape(needs: Sequence[ModelNeed], *, page_bytes: int) -> PoolShape:
    """Pages as `pool_shape` makes them, and no more of them than have to be: for trials before the pool is laid out."""
    page_bytes, tokens_per_page = _page_shape(needs, page_bytes)
    return PoolShape(page_bytes, FEWEST_PAGES, tokens_per_page)


def _page_shape(needs: Sequence[ModelNeed], page_bytes: int) -> tuple[int, tuple[int, ...]]:
    """A page's bytes, and the tokens of each model in it."""
    largest = max(needs, key=lambda need: need.kv_bytes_per_token)
    page_bytes = _round_up(page_bytes or AUTO_TOKENS_PER_PAGE * largest.kv_bytes_per_token)
    if page_bytes < largest.kv_bytes_per_token:
        raise ModelError(
            f"page_bytes is {page_bytes}, but one token of model {largest.name} takes {largest.kv_bytes_per_token}"
        )
    return page_bytes, tuple(page_bytes // need.kv_bytes_per_token for need in needs)


def device_pool_bytes(*, wanted: int, share: float, free_bytes: int, peak_bytes: int, device: str) -> int:
    """The pool's bytes on a card with `free_bytes` left beside the weights; `wanted` 0 takes `share` of the rest.

    The rest is what remains after twice the largest step's `peak_bytes` (prefills and graphs keep memory of their own)
    and what captured graphs take. Raises ModelError where that is not enough for `wanted`, or for anything.
    """
    rest = free_bytes - 2 * peak_bytes - GRAPH_BYTES
    if rest <= 0:
        raise ModelError(
            f"{device} has {free_bytes} bytes left beside the weights, and the largest step needs "
            f"{2 * peak_bytes + GRAPH_BYTES}; lower engine.max_step_tokens or engine.max_num_running"
        )
    if wanted > rest:
        raise ModelError(
            f"pool_bytes is {wanted}, but {device} has only {rest} bytes left for it; lower engine.pool_bytes, "
            "engine.max_step_tokens or engine.max_num_running"
        )
    return wanted or int(share * rest)


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class KVMemory:
    """The pool's memory, zeroed; on a CPU the system backs a page only when it is first written."""

    def __init__(self, shape: PoolShape, device: torch.device) -> None:
        self.shape = shape
        num_bytes = shape.num_pages * shape.page_bytes
        if device.type == "cpu":
            # numpy zeroes by asking the system for zero pages (calloc); torch.zeros would write all of them now.
            block = torch.from_numpy(np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8))
            first = -block.data_ptr() % ALIGNMENT
            self.bytes = block[first : first + num_bytes]
        else:
            self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def layers(
        self, model: int, *, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        """Views (k, v) per layer, each [num_pages, num_kv_heads, tokens_per_page, head_dim]; the last is contiguous."""
        tokens = self.shape.tokens_per_page[model]
        sizes = (self.shape.num_pages, num_layers, 2, num_kv_heads, tokens, head_dim)
        strides = [self.shape.page_bytes // dtype.itemsize, 0, 0, 0, 0, 1]
        for axis in range(4, 0, -1):
            strides[axis] = strides[axis + 1] * sizes[axis + 1]
        pages = torch.as_strided(self.bytes.view(dtype), sizes, strides)
        return [(pages[:, layer, 0], pages[:, layer, 1]) for layer in range(num_layers)]


def available_memory() -> int:
    """Bytes that this process can still take on the host: of the system, and of the control groups it is in."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        limits.append(1024 * int(_fields(meminfo.read_text())["MemAvailable:"]))
    membership = Path("/proc/self/cgroup")
    if membership.exists():
        limits += control_group_memory(membership.read_text(), Path("/sys/fs/cgroup"))
    return max(0, min(limits))


def control_group_memory(membership: str, root: Path) -> list[int]:
    """What each limited control group (version 2) on the way from the process's own up to `root` has left, in bytes.

    Its page cache that is not in use, such as weight files that were read, counts as left. `membership` is the text of
    /proc/self/cgroup.
    """
    own = next((line.removeprefix("0::/") for line in membership.splitlines() if line.startswith("0::/")), None)
    if own is None:
        return []
    left = []
    for group in (root / own, *(parent for parent in (root / own).parents if parent.is_relative_to(root))):
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                reclaimable = int(_fields((group / "memory.stat").read_text())["inactive_file"])
                left.append(int(limit) - int((group / "memory.current").read_text()) + reclaimable)
        except FileNotFoundError:
            continue  # the root has no limit, and a container sees only its own group
    return left


def _fields(text: str) -> dict[str, str]:
    """The first two words of each line."""
    return dict(line.split()[:2] for line in text.splitlines() if line)
