"""Memory for packed weights: what lies there stays the same through the system's rearranging."""

from __future__ import annotations

import gc

import torch

from aiexport_edge.kernels import large_pages
from aiexport_edge.kernels.large_pages import LARGE_PAGE, allocate, collapse


def test_large_blocks_begin_at_a_large_page() -> None:
    for num_bytes in (LARGE_PAGE, LARGE_PAGE + 1, 5 * LARGE_PAGE - 7):
        block = allocate(num_bytes)
        assert (block.numel(), block.dtype) == (num_bytes, torch.uint8)
        assert block.data_ptr() % LARGE_PAGE == 0
        assert not block.any()


def test_small_blocks_are_zero_too() -> None:
    for num_bytes in (0, 1, LARGE_PAGE - 1):
        block = allocate(num_bytes)
        assert block.shape == (num_bytes,)
        assert not block.any()


def test_collapsing_changes_nothing_and_is_done_once() -> None:
    gc.collect()
    collapse()  # what other tests have left
    blocks = [allocate(3 * LARGE_PAGE + 4096), allocate(100), allocate(LARGE_PAGE)]
    for number, block in enumerate(blocks):
        block.copy_((torch.arange(block.numel()) * 7 + number).to(torch.uint8))
    before = [block.clone() for block in blocks]
    places = [block.data_ptr() for block in blocks]
    done = collapse()
    assert done in range(5)  # all four, where the system has large pages to give
    assert all(torch.equal(block, was) for block, was in zip(blocks, before, strict=True))
    assert [block.data_ptr() for block in blocks] == places
    assert collapse() == 0


def test_blocks_that_are_gone_are_left_alone() -> None:
    gc.collect()
    collapse()
    block = allocate(2 * LARGE_PAGE)
    view = block[10:20]
    del block
    gc.collect()
    view.fill_(3)
    collapse()
    assert view.tolist() == [3] * 10  # a view keeps its block
    allocate(2 * LARGE_PAGE)
    gc.collect()
    assert collapse() == 0
    assert large_pages._blocks == []
