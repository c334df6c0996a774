"""Batches from plans: positions, slots, block tables, sampled rows; and the rows that requests keep between steps."""

from __future__ import annotations

import torch

from aiexport_edge.engine.core.batch import BatchBuilder
from aiexport_edge.engine.core.plan import Chunk
from aiexport_edge.engine.core.protocol import Priority, Sampling
from aiexport_edge.engine.core.request import Request


def request(handle: int, num_tokens: int, pages: list[int], num_prompt_tokens: int = 1) -> Request:
    return Request(
        handle=handle,
        model=0,
        token_ids=[100 * handle + i for i in range(num_tokens)],
        num_prompt_tokens=num_prompt_tokens,
        max_tokens=9,
        stop_ids=frozenset(),
        sampling=Sampling(temperature=0.5 * handle, top_p=0.25, top_k=handle, seed=2**64 - handle),
        tenant="",
        weight=1.0,
        salt=b"",
        priority=Priority.INTERACTIVE,
        arrival=handle,
        pages=pages,
    )


def builder(max_requests: int = 4) -> BatchBuilder:
    return BatchBuilder(tokens_per_page=3, context_window=30, max_requests=max_requests, device=torch.device("cpu"))


def test_decodes_and_prefill_chunks_in_one_batch() -> None:
    decode, prefill = request(1, 8, [7, 9, 4]), request(2, 10, [5, 6, 8])
    last = request(3, 4, [2, 3], num_prompt_tokens=4)
    batch, draws = builder().build([Chunk(decode, 7, 1, True), Chunk(prefill, 2, 5, False), Chunk(last, 0, 4, True)])
    assert batch.input_ids is not None
    assert batch.input_ids.tolist() == [107, 202, 203, 204, 205, 206, 300, 301, 302, 303]
    assert batch.positions.tolist() == [[7, 2, 3, 4, 5, 6, 0, 1, 2, 3]] * 3
    assert batch.slots.tolist() == [13, 17, 18, 19, 20, 24, 6, 7, 8, 9]
    assert batch.query_start_loc.tolist() == [0, 1, 6, 10]
    assert batch.seq_lens.tolist() == [8, 7, 4]
    assert [row[:pages] for row, pages in zip(batch.block_tables.tolist(), [3, 3, 2], strict=True)] == [
        [7, 9, 4],
        [5, 6, 8],
        [2, 3],
    ]
    assert batch.rows is not None
    assert batch.rows.tolist() == [0, 9]
    assert [r.handle for r in draws.requests] == [1, 3]
    assert draws.temperature.tolist() == [0.5, 1.5]
    assert draws.top_k.tolist() == [1, 3]
    assert draws.seeds.tolist() == [-1, -3]
    assert draws.output_index.tolist() == [7, 0]
    for tensor, dtype in (
        (batch.input_ids, torch.int64),
        (batch.positions, torch.int64),
        (batch.slots, torch.int64),
        (batch.block_tables, torch.int32),
        (batch.query_start_loc, torch.int32),
        (batch.seq_lens, torch.int32),
        (batch.rows, torch.int64),
        (draws.temperature, torch.float32),
        (draws.top_k, torch.int32),
        (draws.top_p, torch.float32),
        (draws.seeds, torch.int64),
        (draws.output_index, torch.int64),
    ):
        assert tensor.dtype == dtype


def test_every_row_sampled_or_none() -> None:
    first, second = request(1, 2, [1]), request(2, 5, [2, 3])
    build = builder().build
    assert build([Chunk(first, 1, 1, True), Chunk(second, 4, 1, True)])[0].rows is None
    batch, draws = build([Chunk(second, 0, 4, False)])
    assert batch.rows is not None
    assert batch.rows.tolist() == []
    assert [r.handle for r in draws.requests] == []


def test_rows_follow_pages_that_change() -> None:
    """Guards against a stale row after a preemption that ends at the same position in other pages."""
    steady = request(1, 7, [1, 2, 3])
    build = builder().build
    assert build([Chunk(steady, 6, 1, True)])[0].slots.tolist() == [9]
    steady.pages = [1, 2, 5]
    assert build([Chunk(steady, 6, 1, True)])[0].slots.tolist() == [15]
    steady.pages = [8, 2, 5]
    assert build([Chunk(steady, 6, 1, True)])[0].block_tables.tolist() == [[8, 2, 5]]
    steady.pages.append(9)
    assert build([Chunk(steady, 6, 1, True)])[0].block_tables.tolist() == [[8, 2, 5]]
    steady.token_ids += range(6)
    assert build([Chunk(steady, 9, 1, True)])[0].block_tables.tolist() == [[8, 2, 5, 9]]


def test_rows_of_requests_that_left_are_taken_back() -> None:
    build = builder(max_requests=2).build
    staying = request(1, 4, [1, 2])
    for handle in range(2, 9):
        other = request(handle, 4, [handle, handle + 1])
        batch, draws = build([Chunk(staying, 3, 1, True), Chunk(other, 3, 1, True)])
        assert batch.block_tables.tolist() == [[1, 2], [handle, handle + 1]]
        assert draws.top_k.tolist() == [1, handle]
