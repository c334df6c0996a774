"""Three engines behind one shim, all real processes: one is drained and one killed under load, and no stream is cut."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.edge import VLLM_PYTHON, Reply, fold, message, stream
from support.fleet import EngineProcess, Fleet

from aiexport_edge.proto.config import source_directory

CONFIG = """
[engine]
num_threads = 1
pool_bytes = "64MiB"
drain = "2m"
"""
MODEL = """
[[models]]
ids = ["apex-haiku-4-20250401"]
family = "haiku"
source = "{source}"
dtype = "float32"
"""
VLLM = """
backend = "vllm"
[models.vllm]
python = "{python}"
kv_cache_bytes = "64MiB"
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


async def streams(
    fleet: Fleet, number: int, begun: asyncio.Event, after: int, asked: list[dict[str, Any]] | None = None
) -> list[Reply]:
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
        return list(await asyncio.gather(*(one(client, body) for body in asked or bodies(number))))


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
        killed.kill()
        replies = await running
        assert left.process is not None
        assert left.process.poll() is None
        return replies

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

    # What comes back gets work again.
    killed.start()
    killed.wait_ready()
    assert asyncio.run(undisturbed()) == expected


@pytest.mark.prove
def test_engines_die_and_drain_in_turn_under_load(fleet: Fleet) -> None:
    """Eight times: the next one is killed or drained, and started again. Sixteen clients ask on and on meanwhile; every
    text is what it is in quiet."""
    asked = [body | {"max_tokens": 400} for body in bodies(16)]

    def upset(turn: int) -> None:
        engine = fleet.engines[turn % len(fleet.engines)]
        if turn % 2:
            engine.drain()
            assert engine.process is not None
            engine.process.wait(200)
        else:
            engine.kill()
        engine.start()
        engine.wait_ready()

    async def test() -> list[tuple[int, Reply]]:
        over = asyncio.Event()
        replies = []

        async def ask(client: Any, number: int) -> None:
            while not over.is_set():
                replies.append((number, await stream(client, asked[number])))

        async with fleet.client() as client:
            asking = [asyncio.create_task(ask(client, number)) for number in range(len(asked))]
            for turn in range(8):
                await asyncio.to_thread(upset, turn)
            over.set()
            await asyncio.gather(*asking)
        return replies

    async def quiet() -> list[str]:
        return [reply.text for reply in await streams(fleet, len(asked), asyncio.Event(), after=1, asked=asked)]

    expected = asyncio.run(quiet())
    replies = asyncio.run(test())
    assert {reply.status for _, reply in replies} == {200}
    assert [reply.error for _, reply in replies] == [None] * len(replies)
    assert [reply.text for _, reply in replies] == [expected[number] for number, _ in replies]
    resumed = fleet.log().count("goes on at engine")
    assert resumed
    print(f"{len(replies)} replies, {resumed} times one went on at another engine")


@pytest.mark.skipif(
    not os.environ.get(VLLM_PYTHON), reason=f"{VLLM_PYTHON} names no interpreter that has vLLM: nothing to test"
)
def test_two_native_engines_and_one_of_vllm_behind_one_tier(tmp_path: Path) -> None:
    """All three get work. The vLLM engine is killed under load: its replies go on at the native ones, each from the
    token where it was; a native one is drained. In float32 both backends choose the same tokens at temperature 0."""
    model = MODEL.format(source=source_directory("demo"))
    native = CONFIG + model
    configs = [native, native, native + VLLM.format(python=os.environ[VLLM_PYTHON])]
    engines = [EngineProcess(tmp_path, f"engine{number}", config) for number, config in enumerate(configs)]
    fleet = Fleet(tmp_path, engines, model)
    number = 12
    asked = [body | {"temperature": 0} for body in bodies(number)]

    async def test() -> tuple[list[Reply], list[Reply]]:
        async with fleet.client() as client:
            calm = [await stream(client, body) for body in asked]
            assert all(engine.stats().models[0].output_tokens for engine in engines)
            begun = asyncio.Event()
            running = asyncio.create_task(streams(fleet, number, begun, after=number, asked=asked))
            await asyncio.wait([running, asyncio.create_task(begun.wait())], return_when=asyncio.FIRST_COMPLETED)
            engines[2].kill()
            engines[0].drain()
            replies = await running
        return calm, replies

    try:
        fleet.start()
        revisions = {model.revision for engine in engines for model in engine.models()}
        assert len(revisions) == 1, "the same weights are the same revision on both backends"
        calm, replies = asyncio.run(test())
    finally:
        fleet.stop()
    assert [reply.error for reply in [*calm, *replies]] == [None] * 2 * number
    assert [reply.events.count("message_start") for reply in replies] == [1] * number
    assert [reply.text for reply in replies] == [reply.text for reply in calm]
