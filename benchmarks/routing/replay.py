"""Replays conversations at an installation: so many streams at once, each turn after the reply to the one before."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks.routing.conversations import Texts, Turn
from benchmarks.routing.installation import Installation

MODEL = "apex-haiku-4-20250401"
MEASURE_S = 1.2  # the shim's numbers are set once a second


class Replay:
    """One run of all turns."""

    def __init__(self, installation: Installation, turns: Sequence[Turn], *, streams: int) -> None:
        self._installation = installation
        self._turns = turns
        self._streams = streams
        self._texts = Texts()
        self._said: dict[int, list[dict[str, str]]] = {}
        self._ended = [asyncio.Event() for _ in turns]
        self._before: list[int | None] = []
        latest: dict[int, int] = {}
        for number, turn in enumerate(turns):
            self._before.append(latest.get(turn.conversation))
            latest[turn.conversation] = number
        self.usages: list[dict[str, int]] = []
        self.first_s: list[float] = []

    async def run(self) -> dict[str, Any]:
        """What it came to."""
        queue = iter(range(len(self._turns)))
        limits = httpx.Limits(max_connections=None)
        headers = {"X-API-Key": self._installation.key}
        began = time.perf_counter()
        async with httpx.AsyncClient(
            base_url=self._installation.url, headers=headers, timeout=600, limits=limits
        ) as client:

            async def work() -> None:
                for number in queue:
                    await self._one(client, number)

            async with asyncio.TaskGroup() as group:
                for _ in range(self._streams):
                    group.create_task(work())
        took = time.perf_counter() - began
        await asyncio.sleep(MEASURE_S)
        cached = sum(usage["cache_read_input_tokens"] for usage in self.usages)
        prompt = cached + sum(usage["input_tokens"] for usage in self.usages)
        firsts = sorted(self.first_s)
        find = self._installation
        return {
            "requests": len(self.usages),
            "prompt_tokens": prompt,
            "hit_rate": round(cached / prompt, 4),
            "first_token_p50_ms": round(1000 * firsts[len(firsts) // 2]),
            "first_token_mean_ms": round(1000 * statistics.fmean(firsts)),
            "first_token_p99_ms": round(1000 * firsts[len(firsts) * 99 // 100]),
            "seconds": round(took, 1),
            "requests_by_engine": [
                int(find.metric("aiexport_engine_accepted_total", engine=address)) for address in find.engines
            ],
            "prompt_tokens_by_engine": [
                int(find.metric("aiexport_engine_prompt_tokens_total", engine=address, kind="all"))
                for address in find.engines
            ],
        }

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        turn, before = self._turns[number], self._before[number]
        if before is not None:
            await self._ended[before].wait()
        said = self._said.setdefault(turn.conversation, [])
        said.append({"role": "user", "content": self._texts.user(turn)})
        body = {
            "model": MODEL,
            "system": self._texts.system(turn.system),
            "messages": said,
            "max_tokens": turn.output,
            "temperature": 0,
        }
        began = time.perf_counter()
        text = ""
        async with client.stream("POST", "/v2/messages/stream", json=body) as reply:
            if reply.status_code != 200:
                raise RuntimeError((await reply.aread()).decode())
            usage: dict[str, int] = {}
            async for line in reply.aiter_lines():
                if not line.startswith("data:"):
                    continue
                text, usage = self._fold(line[5:], text, usage, began)
        self.usages.append(usage)
        said.append({"role": "assistant", "content": text or "-"})
        self._ended[number].set()

    def _fold(self, line: str, text: str, usage: dict[str, int], began: float) -> tuple[str, dict[str, int]]:
        event = json.loads(line)
        match event["type"]:
            case "message_start":
                usage = event["message"]["usage"]
            case "content_block_delta":
                if not text:
                    self.first_s.append(time.perf_counter() - began)
                text += event["delta"]["text"]
            case "error":
                raise RuntimeError(event["error"]["message"])
        return text, usage
