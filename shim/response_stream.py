"""The short way out for a streamed body: pieces go into the connection without an ASGI message or a task switch each.

An ASGI extension of this project's own server, in the scope under `EXTENSION`. The head of the response and the last
piece are sent as ever; in between `write` may be called from anywhere on the event loop. A layer that wraps `send` to
see a body wraps this too. Measured on two cores of a virtual machine: 9 µs of the processor's time for an event
written this way, of which the system's own send is 8; by a message and a task switch it is 13.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ClassVar, Protocol
from weakref import WeakKeyDictionary

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

EXTENSION = "aiexport.stream"


class ResponseStream(Protocol):
    """What an endpoint sees of it."""

    @property
    def is_full(self) -> bool:
        """The client leaves too much unread: nothing should be written until `room`."""

    def write(self, piece: bytes) -> None:
        """A piece of the body, not empty, between its start and its last. Goes nowhere once the client has left."""

    def offer(self, piece: bytes) -> bool:
        """As `write`, unless it is full; whether it has taken it. One call where a token costs what its calls cost."""

    def room(self) -> Awaitable[None]:
        """Until the client has read on, or left."""


class TurnWriter:
    """Writes what one turn of an event loop has for its connections at the turn's end, one after the other.

    A step brings a token to each of hundreds of streams. All of the Python first and then all of the system's calls
    keeps each kind's memory in the caches: 5 % less of the processor's time than alternating.
    """

    _of_loops: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, TurnWriter]] = WeakKeyDictionary()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> TurnWriter:
        """The one of this loop."""
        writer = cls._of_loops.get(loop)
        if writer is None:
            writer = cls._of_loops[loop] = cls()
        return writer

    def __init__(self) -> None:
        self._pending: dict[Callable[[bytes], None], bytes] = {}

    def write(self, write: Callable[[bytes], None], data: bytes) -> None:
        """`write(data)`, before any callback of the loop that is called for from now on; in one piece with what else
        the turn has for it: a reply's start and its first token come together."""
        pending = self._pending
        if not pending:
            asyncio.get_running_loop().call_soon(self._flush)
        elif write in pending:
            data = pending[write] + data
        pending[write] = data

    def _flush(self) -> None:
        pending, self._pending = self._pending, {}
        for write, data in pending.items():
            write(data)


class ConnectionStream:
    """The server's end of it, for one response."""

    __slots__ = ("_cycle", "_flow", "_turn", "_write")

    def __init__(self, cycle: RequestResponseCycle, loop: asyncio.AbstractEventLoop) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._turn = TurnWriter.of(loop).write
        self._write = cycle.transport.write

    @property
    def is_full(self) -> bool:
        return self._flow.write_paused

    def write(self, piece: bytes) -> None:
        cycle = self._cycle
        assert cycle.chunked_encoding
        if not cycle.disconnected:
            self._turn(self._write, b"%x\r\n%b\r\n" % (len(piece), piece))  # a chunk: RFC 9112, section 7.1

    def offer(self, piece: bytes) -> bool:
        if self._flow.write_paused:
            return False
        if not self._cycle.disconnected:
            self._turn(self._write, b"%x\r\n%b\r\n" % (len(piece), piece))
        return True

    async def room(self) -> None:
        await self._flow.drain()


class PlainStream(ConnectionStream):
    """The same without chunks, for HTTP/1.0."""

    __slots__ = ()

    def write(self, piece: bytes) -> None:
        if not self._cycle.disconnected:
            self._turn(self._write, piece)

    def offer(self, piece: bytes) -> bool:
        if self._flow.write_paused:
            return False
        self.write(piece)
        return True


def stream_of(scope: Scope) -> ResponseStream:
    """The stream of the response to this request."""
    stream: ResponseStream = scope["extensions"][EXTENSION]
    return stream
