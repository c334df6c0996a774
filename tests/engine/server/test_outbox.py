"""The outbox: one message for everything that waits, deltas joined, an end to patience."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

import pytest

from aiexport_edge.engine.server.outbox import Outbox, OutboxBound
from aiexport_edge.proto import engine_pb2 as pb


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 10))


def no_overflow() -> None:
    raise AssertionError("overflow")


def _events(outputs: Iterable[pb.Output]) -> list[tuple[int, str | None]]:
    return [(output.tag, output.WhichOneof("event")) for output in outputs]


def test_deltas_of_a_request_are_joined_and_events_keep_their_order() -> None:
    async def test() -> None:
        outbox = Outbox(no_overflow, OutboxBound())
        outbox.accepted(1, pb.Accepted(prompt_tokens=3))
        outbox.started(1, 2)
        outbox.delta(1, "a", [5], output_tokens=1, emitted_bytes=1)
        outbox.delta(2, "x", [9], output_tokens=4, emitted_bytes=7)
        outbox.delta(1, "bé", [6, 7], output_tokens=3, emitted_bytes=4)
        outbox.finished(1, pb.Finished(output_tokens=3))
        outbox.refused(1, pb.ErrorDetail(message="no"))  # the tag is used again
        outputs = await outbox.take()
        assert outputs is not None
        assert _events(outputs.outputs) == [(1, "accepted"), (1, "started")]
        deltas = outputs.deltas
        assert list(zip(deltas.tags, deltas.texts, strict=True)) == [(1, "abé"), (2, "x")]
        assert list(deltas.token_ids) == [5, 6, 7, 9]
        assert list(deltas.num_token_ids) == [3, 1]
        assert list(deltas.output_tokens) == [3, 4]
        assert list(deltas.emitted_bytes) == [4, 7]
        assert _events(outputs.ends) == [(1, "finished")]
        outbox.delta(2, "y", [1], output_tokens=5, emitted_bytes=8)
        again = await outbox.take()
        assert again is not None
        assert _events(again.outputs) == [(1, "refused")]
        assert list(again.deltas.texts) == ["y"]  # what has been taken is not touched again
        assert not again.deltas.num_token_ids
        assert not again.ends

    run(test())


def test_it_ends_when_closed_and_empty() -> None:
    async def test() -> None:
        outbox = Outbox(no_overflow, OutboxBound())
        waiter = asyncio.create_task(outbox.take())
        await asyncio.sleep(0)
        outbox.failed(1, pb.ErrorDetail(message="m"))
        outbox.close()
        outputs = await waiter
        assert outputs is not None
        assert len(outputs.ends) == 1
        assert await outbox.take() is None
        assert await outbox.take() is None

    run(test())


def test_what_is_discarded_is_not_sent() -> None:
    async def test() -> None:
        outbox = Outbox(no_overflow, OutboxBound())
        outbox.started(1, 0)
        outbox.discard()
        outbox.delta(1, "late", [1], output_tokens=1, emitted_bytes=4)
        assert await outbox.take() is None

    run(test())


def test_draining_is_told_at_once_and_from_then_on() -> None:
    async def test() -> None:
        outbox = Outbox(no_overflow, OutboxBound())
        outbox.drain()
        outputs = await outbox.take()
        assert outputs is not None
        assert outputs.draining
        assert not outputs.outputs
        outbox.started(1, 0)
        outputs = await outbox.take()
        assert outputs is not None
        assert outputs.draining

    run(test())


def test_the_bound_in_bytes() -> None:
    async def test() -> None:
        overflows: list[int] = []
        outbox = Outbox(lambda: overflows.append(1), OutboxBound(max_bytes=1000))
        for _ in range(3):  # read in time: never too much
            outbox.delta(1, "x" * 600, [], output_tokens=1, emitted_bytes=1)
            await outbox.take()
        assert not overflows
        for _ in range(5):
            outbox.delta(1, "x" * 300, [], output_tokens=1, emitted_bytes=1)
        assert overflows == [1]  # said once

    run(test())


def test_the_bound_in_age(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        now = 100.0
        monkeypatch.setattr("aiexport_edge.engine.server.outbox.time.monotonic", lambda: now)
        overflows: list[int] = []
        outbox = Outbox(lambda: overflows.append(1), OutboxBound(max_age_s=20.0))
        outbox.started(1, 0)
        now = 119.0
        outbox.started(2, 0)
        await outbox.take()
        now = 135.0
        outbox.started(3, 0)
        now = 154.0
        outbox.started(4, 0)
        assert not overflows
        now = 156.0
        outbox.started(5, 0)
        assert overflows == [1]

    run(test())
