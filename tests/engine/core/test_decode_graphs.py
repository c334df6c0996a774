"""Buckets, the layout of the inputs and their refresh, padding rows, and captures when first needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiexport_edge.engine.core.batch import BatchBuilder
from aiexport_edge.engine.core.decode_graphs import bucket_of, decode_buckets, first_buckets
from aiexport_edge.engine.core.decode_inputs import ALIGNMENT, DecodeInputs
from aiexport_edge.engine.core.plan import PENDING_ID, Chunk
from aiexport_edge.engine.core.protocol import Priority, Sampling
from aiexport_edge.engine.core.request import Request


def request(handle: int, token_ids: list[int], pages: list[int]) -> Request:
    return Request(
        handle=handle,
        model=0,
        token_ids=token_ids,
        num_prompt_tokens=1,
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


def test_buckets_of_usual_sizes() -> None:
    assert decode_buckets(1) == (1,)
    assert decode_buckets(2) == (1, 2)
    assert decode_buckets(20) == (1, 2, 4, 8, 12, 16, 20)
    assert decode_buckets(64) == (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64)
    assert first_buckets(decode_buckets(20)) == [20, 16, 8, 4, 2, 1]
    assert len(decode_buckets(1024)) < 60


@given(largest=st.integers(1, 2000), data=st.data())
def test_every_batch_has_a_bucket_of_little_padding(largest: int, data: st.DataObject) -> None:
    buckets = decode_buckets(largest)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == largest
    num_rows = data.draw(st.integers(1, largest))
    bucket = bucket_of(buckets, num_rows)
    assert num_rows <= bucket < num_rows + max(4, min(32, num_rows))
    assert bucket in buckets


@pytest.mark.parametrize(("num_rows", "num_slots", "pages_per_row"), [(1, 1, 1), (5, 3, 7), (64, 64, 33)])
def test_sections_are_aligned_and_apart(num_rows: int, num_slots: int, pages_per_row: int) -> None:
    inputs = DecodeInputs(
        num_rows=num_rows, num_slots=num_slots, pages_per_row=pages_per_row, device=torch.device("cpu")
    )
    base = inputs.tokens.data_ptr()
    for name in ("source", "positions", "slots", "seq_lens", "temperature", "top_p", "block_tables"):
        assert (getattr(inputs, name).data_ptr() - base) % ALIGNMENT == 0, name
    assert inputs.first_host_id >= num_slots
    staging = torch.full((inputs.staged_bytes(num_rows),), 0xEE, dtype=torch.uint8)
    host = inputs.host_rows(staging, num_rows)
    for value, name in enumerate(host.__slots__):
        getattr(host, name)[:] = value
    inputs.tokens[: inputs.first_host_id] = 77
    inputs.refresh(staging)
    for value, name in enumerate(host.__slots__):
        if name != "host_ids":
            assert bool((getattr(inputs, name) == value).all()), name
    assert inputs.tokens.tolist() == [77] * inputs.first_host_id + [0] * num_rows


def test_decodes_are_staged_and_the_rest_is_padding() -> None:
    inputs = DecodeInputs(num_rows=8, num_slots=4, pages_per_row=10, device=torch.device("cpu"))
    builder = BatchBuilder(tokens_per_page=3, context_window=30, max_requests=4, device=torch.device("cpu"))
    first, second = request(1, [10, 11, 12, 13], [7, 9]), request(2, [20, 21, PENDING_ID], [5])
    staging = torch.full((inputs.staged_bytes(4),), 0x7F, dtype=torch.uint8)
    draws = builder.stage_decodes([Chunk(first, 3, 1, True), Chunk(second, 2, 1, True)], 4, inputs, staging)
    inputs.tokens[:] = torch.arange(1000, 1000 + len(inputs.tokens))
    inputs.refresh(staging)

    slot_of_second = int(draws.token_slots[1])
    ids = inputs.tokens[inputs.source[:4]]
    assert ids[0] == 13  # from the host
    assert ids[1] == 1000 + slot_of_second  # what the step before left on the device
    assert inputs.positions[:4].tolist() == [3, 2, 0, 0]
    assert inputs.slots[:4].tolist() == [9 * 3, 5 * 3 + 2, 0, 0]  # padding writes to page 0
    assert inputs.seq_lens[:4].tolist() == [4, 3, 1, 1]  # and reads that
    assert inputs.block_tables[0, :2].tolist() == [7, 9]
    assert inputs.block_tables[1, 0] == 5
    assert inputs.block_tables[2:4, 0].tolist() == [0, 0]
    assert [drawn.handle for drawn in draws.requests] == [1, 2]
    assert draws.temperature.tolist() == [0.5, 1.0]
    assert draws.top_k.tolist() == [1, 2]
    assert draws.top_p.tolist() == [0.25, 0.25]
    assert draws.seeds.tolist() == [-1, -2]
    assert draws.output_index.tolist() == [3, 2]
    assert len(set(draws.token_slots.tolist())) == 2


def test_an_upload_equals_the_arrays() -> None:
    """Batches built through staging memory are those that are built without."""
    chunks = [Chunk(request(1, list(range(8)), [7, 9, 4]), 2, 6, True), Chunk(request(2, [5, 6], [3]), 0, 2, False)]
    plain = BatchBuilder(tokens_per_page=3, context_window=30, max_requests=4, device=torch.device("cpu"))
    staged = BatchBuilder(
        tokens_per_page=3,
        context_window=30,
        max_requests=4,
        device=torch.device("cpu"),
        staging=lambda size: torch.full((size,), 0x7F, dtype=torch.uint8),
    )
    (batch, draws), (other_batch, other_draws) = plain.build(chunks), staged.build(chunks)
    for one, other in ((batch, other_batch), (draws, other_draws)):
        for name in one.__slots__:
            value, other_value = getattr(one, name), getattr(other, name)
            if isinstance(value, torch.Tensor):
                assert value.dtype == other_value.dtype, name
                assert torch.equal(value, other_value), name
            else:
                assert value == other_value, name
