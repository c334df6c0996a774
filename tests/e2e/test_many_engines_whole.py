"""Three engines behind one shim, all real processes: one is drained and one killed under load, and no stream is cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.edge import Reply, fold, message, stream
from support.fleet import EngineProcess, Fleet

CONFIG = """
[engine]
num_threads = 1
pool_bytes = "64MiB"
drain = "2m"
"""
TEXTS = [f"Tell me a story about {who}." for who in ("a cat", "a boat", "the moon", "a king", "rain", "a fox")]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, [EngineProcess(tmp_path, f"engine{number}", CONFIG) for number in range(3)], "")
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


def bodies(number: int) -> list[dict[str, Any]]:
    return [
        message(TEXTS[index % len(TEXTS)], max_tokens=160, temperature=1.0, seed=index, top_k=50)
        for index in range(number)
    ]


async def streams(fleet: Fleet, number: int, begun: asyncio.Event, after: int) -> list[Reply]:
    """All at once; `begun` is set when `after` events of text have come over all of them together."""
    seen = 0

    async def one(client: Any, body: dict[str, Any]) -> Reply:
        nonlocal seen
        reply = Reply()
        async with client.stream("POST", "/v2/messages/stream", json=body) as response:
            reply.status = response.status_code
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    fold(reply, json.loads(line[5:]))
                    seen += reply.events[-1] == "content_block_delta"
                    if seen >= after:
                        begun.set()
        return reply

    async with fleet.client() as client:
        return list(await asyncio.gather(*(one(client, body) for body in bodies(number))))


def test_one_drained_and_one_killed_under_load_cost_no_stream(fleet: Fleet) -> None:
    number = 12

    async def undisturbed() -> list[str]:
        async with fleet.client() as client:
            return [(await stream(client, body)).text for body in bodies(number)]

    async def disturbed() -> list[Reply]:
        begun = asyncio.Event()
        running = asyncio.create_task(streams(fleet, number, begun, after=number))
        await asyncio.wait([running, asyncio.create_task(begun.wait())], return_when=asyncio.FIRST_COMPLETED)
        drained, killed, left = fleet.engines
        drained.drain()
        killed.freeze()  # what it has now is not going to end there
        await asyncio.sleep(1.5)  # the gauges are set once a second
        nonlocal cut
        cut = fleet.num_placed(killed)
        killed.kill()
        replies = await running
        assert left.process is not None
        assert left.process.poll() is None
        return replies

    cut = 0.0
    expected = asyncio.run(undisturbed())
    placed = [engine.stats().models[0].output_tokens for engine in fleet.engines]
    assert all(placed), "every engine has had work"
    replies = asyncio.run(disturbed())
    assert [reply.status for reply in replies] == [200] * number
    assert [reply.error for reply in replies] == [None] * number
    assert [reply.text for reply in replies] == expected
    assert [reply.events.count("message_start") for reply in replies] == [1] * number
    drained, killed, _ = fleet.engines
    assert drained.process is not None
    assert drained.process.wait(120) == 0
    assert fleet.log().count("goes on at engine") >= cut

    # What comes back gets work again.
    killed.start()
    killed.wait_ready()
    assert asyncio.run(undisturbed()) == expected
