"""A reply as server-sent events, each written as its tokens come: no task runs for it while it streams.

    session ──▶ generation ──on news──▶ EventStream ──▶ the connection

A client that does not read fills the connection; from then on what comes stays in the generation, which is bounded,
and is one event once there is room again. Pings fill the pauses.
"""

from __future__ import annotations

import asyncio

from aiexport_edge.shim import sse
from aiexport_edge.shim.api.reply import Reply
from aiexport_edge.shim.response_stream import ResponseStream


class EventStream:
    """Writes one reply's events; `run` once."""

    __slots__ = (
        "_entry",
        "_generation",
        "_is_passed_text",
        "_last",
        "_loop",
        "_now",
        "_offer",
        "_ping_s",
        "_ping_timer",
        "_reply",
        "_stream",
        "_waiting",
        "_written_at",
    )

    def __init__(self, reply: Reply, stream: ResponseStream, ping_s: float) -> None:
        self._reply = reply
        self._generation = reply.generation
        self._stream = stream
        self._ping_s = ping_s
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._offer = stream.offer
        assert reply.entry is not None
        self._entry = reply.entry
        self._is_passed_text = False
        self._written_at = self._loop.time()
        self._last = b""
        self._ping_timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[None] | None = None  # for room

    async def run(self) -> bytes:
        """Returns the last events, which are not written. Raises what ended the generation and is no event."""
        self._ping_timer = self._loop.call_later(self._ping_s, self._ping)
        try:
            await self._generation.follow(self._on_news)
        finally:
            self._ping_timer.cancel()
            if self._waiting is not None:
                self._waiting.cancel()
        return self._last

    def _on_news(self) -> bool:
        """Writes what is new; whether it was the last."""
        if self._stream.is_full and not self._generation.ended:
            if self._waiting is None:
                self._waiting = self._loop.create_task(self._wait_for_room())
            return False
        events, more = self._reply.events()
        if not more:
            self._last = events
        elif events:
            self._stream.write(events)
            self._written_at = self._now()
        if not self._is_passed_text and self._reply.has_begun:
            self._is_passed_text = True
            self._generation.pass_text(self._on_text)
        return not more

    def _on_text(self, text: str, output_tokens: int) -> bool:
        """What a step mostly brings, in as few calls as there can be."""
        if not self._offer(sse.text_delta(text)):
            return False
        self._entry.output_tokens = output_tokens
        self._written_at = self._now()
        return True

    async def _wait_for_room(self) -> None:
        await self._stream.room()
        self._waiting = None
        self._generation.tell()

    def _ping(self) -> None:
        now = self._now()
        if now - self._written_at >= self._ping_s:
            if not self._stream.is_full:
                self._stream.write(sse.PING)
            self._written_at = now
        self._ping_timer = self._loop.call_at(self._written_at + self._ping_s, self._ping)
