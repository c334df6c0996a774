"""A reply's events as the engine's word comes: what is written when, also to a connection that is full."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from support.shim_server import HAIKU

from aiexport_edge.proto import config as configuration
from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim import sse
from aiexport_edge.shim.api.event_stream import EventStream
from aiexport_edge.shim.api.messages_request import parse_messages_request
from aiexport_edge.shim.api.reply import Reply
from aiexport_edge.shim.catalog import Listed
from aiexport_edge.shim.engines.generation import ClientGone, Generation
from aiexport_edge.shim.errors import internal_error
from aiexport_edge.shim.exchange import Exchange
from aiexport_edge.shim.prices import Price
from aiexport_edge.shim.usage import Entry

DATA = re.compile(rb"data: ([^\n]*)\n\n")


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


def events(body: bytes) -> list[str]:
    """The texts of deltas, and the types of everything else."""
    found = [json.loads(data) for data in DATA.findall(body)]
    return [each["delta"]["text"] if each["type"] == "content_block_delta" else each["type"] for each in found]


class Connection:
    """The end of a response that a test opens and closes."""

    def __init__(self) -> None:
        self.is_full = False
        self.pieces: list[bytes] = []
        self.written = asyncio.Event()
        self._room = asyncio.Event()

    def write(self, piece: bytes) -> None:
        assert not self.is_full
        self.pieces.append(piece)
        self.written.set()

    def offer(self, piece: bytes) -> bool:
        if not self.is_full:
            self.write(piece)
        return not self.is_full

    async def room(self) -> None:
        await self._room.wait()

    def on_gone(self, callback: Callable[[], None] | None) -> None:
        raise AssertionError("it is the endpoint that asks for this")

    def fill(self) -> None:
        self.is_full = True
        self._room.clear()

    def drain(self) -> None:
        self.is_full = False
        self._room.set()


class Streaming:
    """A reply that is being streamed; the engine's word comes from the test."""

    def __init__(self, tmp_path: Path, *, ping_s: float = 3600.0) -> None:
        config = configuration.load(None, tmp_path)
        request = parse_messages_request({"model": HAIKU, "messages": [{"role": "user", "content": "x"}]})
        self.generation = Generation(pb.GenerateRequest(), max_buffered_bytes=100)
        reply = Reply(request, Listed(HAIKU, config.models[0]), self.generation, Exchange())
        self.entry = reply.entry = Entry(
            request_id="r",
            message_id="m",
            workspace_id="w",
            key_id="k",
            model=HAIKU,
            prompt_tokens=3,
            price=Price.per_million(1, 1),
        )
        self.connection = Connection()
        self.task = asyncio.create_task(EventStream(reply, self.connection, ping_s).run())
        self._sent = 0

    async def start(self) -> None:
        await asyncio.sleep(0)
        self.generation.on_started(pb.Started())

    def say(self, text: str) -> None:
        self._sent += len(text.encode())
        self.generation.on_delta(text, [7], self.generation.output_tokens + 1, self._sent)

    def finish(self) -> None:
        self.generation.on_finished(pb.Finished(reason=pb.FINISH_END_TURN, output_tokens=self.generation.output_tokens))

    def seen(self) -> list[str]:
        return events(b"".join(self.connection.pieces))


def test_every_delta_is_an_event_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        streaming = Streaming(tmp_path)
        await streaming.start()
        assert streaming.seen() == ["message_start", "content_block_start"]
        for text in ("a", "é\n", ""):
            streaming.say(text)
        assert streaming.seen()[2:] == ["a", "é\n"]
        streaming.finish()
        last = await streaming.task
        assert events(last) == ["content_block_stop", "message_delta", "message_stop"]
        assert streaming.entry.output_tokens == 3

    run(test())


def test_what_came_before_it_began_is_one_event(tmp_path: Path) -> None:
    async def test() -> None:
        streaming = Streaming(tmp_path)
        streaming.generation.on_started(pb.Started())
        streaming.say("a")
        streaming.say("b")
        await asyncio.sleep(0)
        assert streaming.seen() == ["message_start", "content_block_start", "ab"]
        streaming.finish()
        await streaming.task

    run(test())


def test_a_full_connection_is_not_written_to_and_loses_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        streaming = Streaming(tmp_path)
        await streaming.start()
        streaming.say("a")
        streaming.connection.fill()
        for text in "bcd":
            streaming.say(text)
        assert streaming.seen()[2:] == ["a"]
        streaming.connection.written.clear()
        streaming.connection.drain()
        await streaming.connection.written.wait()
        assert streaming.seen()[2:] == ["a", "bcd"]
        streaming.connection.fill()
        streaming.say("e")
        streaming.finish()  # the last piece waits for room where it is sent
        assert events(await streaming.task) == ["e", "content_block_stop", "message_delta", "message_stop"]

    run(test())


def test_a_client_that_does_not_read_loses_the_generation(tmp_path: Path) -> None:
    async def test() -> None:
        streaming = Streaming(tmp_path)
        await streaming.start()
        streaming.connection.fill()
        streaming.say("x" * 60)
        streaming.say("x" * 60)
        with pytest.raises(ClientGone):
            await streaming.task
        assert streaming.generation.ended

    run(test())


@pytest.mark.parametrize("full", [False, True])
def test_a_failure_comes_after_the_text_before_it(tmp_path: Path, full: bool) -> None:
    async def test() -> None:
        streaming = Streaming(tmp_path)
        await streaming.start()
        if full:
            streaming.connection.fill()
            streaming.say("a")
            streaming.connection.is_full = False  # room, but nobody has noticed yet
        else:
            streaming.say("a")
        streaming.generation.fail(internal_error())
        assert events(await streaming.task) == ["error"]
        assert streaming.seen()[2:] == ["a"]

    run(test())


def test_pings_fill_the_pauses_but_not_a_full_connection(tmp_path: Path) -> None:
    async def test() -> None:
        streaming = Streaming(tmp_path, ping_s=0.01)
        await streaming.connection.written.wait()
        assert streaming.connection.pieces[0] == sse.PING
        streaming.connection.fill()  # a ping now would be an error of the connection's
        await asyncio.sleep(0.05)
        streaming.connection.drain()
        streaming.connection.written.clear()
        await streaming.connection.written.wait()
        streaming.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await streaming.task

    run(test())
