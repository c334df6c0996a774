"""The outbox: one message for everything that waits, deltas joined, an end to patience."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from aiexport_edge.engine.server.outbox import MANY, Outbox, OutboxBound
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


def _step(outbox: Outbox, num: int) -> None:
    for tag in range(MANY):
        outbox.delta(tag, "a", [1], output_tokens=num, emitted_bytes=num)


def test_quick_steps_to_many_streams_share_messages() -> None:
    """Four steps in `STEADY_S`, by a clock of the test's."""
    clock = Clock()

    async def test() -> None:
        outbox = Outbox(no_overflow, OutboxBound(max_age_s=1e6))
        num_tokens = 1
        _step(outbox, num_tokens)
        assert await outbox.take() is not None
        for _ in range(10):
            taking = asyncio.create_task(outbox.take())
            while not taking.done():
                clock.now += 250.0
                num_tokens += 1
                _step(outbox, num_tokens)
                for _ in range(5):
                    await asyncio.sleep(0)
            outputs = await taking
            assert outputs is not None
            assert set(outputs.deltas.num_token_ids) == {4}
            assert set(outputs.deltas.output_tokens) == {num_tokens}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiexport_edge.engine.server.outbox.STEADY_S", 1000.0)
        patch.setattr("aiexport_edge.engine.server.outbox.time", SimpleNamespace(monotonic=clock))
        run(test())


@pytest.mark.parametrize("what", ["started", "first", "finished", "closed", "draining"])
def test_what_is_urgent_takes_a_held_message_along(what: str) -> None:
    async def test() -> None:
        outbox = Outbox(no_overflow, OutboxBound())
        _step(outbox, 2)
        assert await outbox.take() is not None
        _step(outbox, 3)
        taking = asyncio.create_task(outbox.take())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not taking.done()
        match what:
            case "started":
                outbox.started(99, 0)
            case "first":
                outbox.delta(99, "a", [1], output_tokens=1, emitted_bytes=1)
            case "finished":
                outbox.finished(3, pb.Finished())
            case "closed":
                outbox.close()
            case _:
                outbox.drain()
        outputs = await taking
        assert outputs is not None
        assert len(outputs.deltas.tags) >= MANY

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiexport_edge.engine.server.outbox.STEADY_S", 1000.0)
        run(test())


def test_a_held_message_goes_without_a_next_step() -> None:
    async def test() -> None:
        outbox = Outbox(no_overflow, OutboxBound())
        for num in (2, 3):
            _step(outbox, num)
            assert await outbox.take() is not None

    run(test())


class Clock:
    """Stands still unless the test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


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
