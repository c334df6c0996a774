"""vLLM killed behind the REST front, its worker or the engine behind it: every stream goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import psutil
import pytest
from support.edge import SONNET, VLLM_PYTHON, Edge, message, stream, wait_until

BODIES = [
    message(f"Tell me a long story about {i} bears. Then tell another one.", seed=i, max_tokens=300, model=SONNET)
    for i in range(8)
]


async def all_of_them(edge: Edge) -> list[Any]:
    async with edge.async_client() as client:
        return await asyncio.gather(*(stream(client, body) for body in BODIES))


def victim_of(edge: Edge, victim: str) -> int:
    worker = edge.stats().core_pid
    if victim == "worker":
        return worker
    children = psutil.Process(worker).children()
    return next(child.pid for child in children if "EngineCor" in " ".join(child.cmdline()))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", ["worker", "engine"])
def test_eight_streams_outlive_a_kill(edge: Edge, victim: str) -> None:
    """Nothing lost, nothing repeated: what each stream had is the beginning of what it says, and no token is billed
    twice. Word for word as undisturbed it need not be: vLLM's last bits depend on what runs beside a request.
    """
    if edge.backend != "vllm":
        pytest.skip(f"a test of vLLM, which runs where {VLLM_PYTHON} names an interpreter that has it")

    async def killed() -> list[Any]:
        running = asyncio.create_task(all_of_them(edge))
        restarts = edge.stats().core_restarts
        produced = (await asyncio.to_thread(edge.stats)).models[0].output_tokens
        while (await asyncio.to_thread(edge.stats)).models[0].output_tokens < produced + 100:
            assert not running.done()
            await asyncio.sleep(0.01)
        os.kill(await asyncio.to_thread(victim_of, edge, victim), signal.SIGKILL)
        replies = await running
        assert (await asyncio.to_thread(edge.stats)).core_restarts == restarts + 1
        return replies

    before = edge.stats().models[0].output_tokens
    replies = asyncio.run(killed())
    assert [reply.error for reply in replies] == [None] * 8
    for reply in replies:
        assert reply.stop_reason in ("end_turn", "max_tokens")
        assert reply.events[-1] == "message_stop"
        assert reply.events.count("message_start") == 1
    wait_until(lambda: edge.stats().running == 0, "all is over", 60)
    # Nothing was made twice (what a worker made in its last tenth of a second it had no time to count).
    assert edge.stats().models[0].output_tokens - before <= sum(reply.usage["output_tokens"] for reply in replies)
