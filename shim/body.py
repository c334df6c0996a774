"""Reads a request's body: within its limit, within what all requests together may hold, within a time.

Owns the count of body bytes in flight. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import Receive

from aiexport_edge.shim.errors import InvalidRequest, Overloaded, RequestTooLarge

IDLE_S = 30.0  # between two pieces of a body
MIN_BYTES_PER_S = 4096  # on the whole, past the first IDLE_S: one that trickles holds a connection and its place
LARGE_BYTES = 1 << 20  # of a body: what was made of it is worth giving back to the system
_CLOSE = ((b"connection", b"close"),)  # the rest may still come, and is no request


class ClientDisconnected(Exception):
    """The connection closed before the body was there; nobody is left to tell."""


class BodyBudget:
    """Bytes of bodies that are held at one time, over all requests of this process.

    A body counts as it arrives, until its request ends: the prompt is kept for as long as it may have to be sent again.
    Past the limit new bytes are refused, rather than waited for: a client that trickles could hold up all others.
    `freed` is called where a large one has ended.
    """

    def __init__(self, limit: int, *, freed: Callable[[], None] | None = None) -> None:
        self.limit = limit
        self.used = 0
        self._freed = freed

    @contextmanager
    def lease(self) -> Iterator[BodyLease]:
        lease = BodyLease(self)
        try:
            yield lease
        finally:
            self.used -= lease.size
            if self._freed is not None and lease.size >= LARGE_BYTES:
                self._freed()


class BodyLease:
    """One request's part of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.size = 0

    def grow(self, size: int) -> None:
        """Raises `Overloaded` where the budget is spent."""
        if self._budget.used + size > self._budget.limit:
            raise Overloaded("Too many large requests are under way just now.", retry_after=1.0)
        self._budget.used += size
        self.size += size


class BodyReader:
    """A body piece by piece, within its limit and within a time. Raises at once where Content-Length is past the limit.

    Raises `RequestTooLarge`, `InvalidRequest` where it stops arriving, `ClientDisconnected`.
    """

    def __init__(self, headers: list[tuple[bytes, bytes]], receive: Receive, *, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._now = asyncio.get_running_loop().time
        self._started = self._now()
        self.size = 0  # so far
        self.ended = False
        for name, value in headers:
            if name == b"content-length" and value.isdigit() and int(value) > max_bytes:
                raise self._too_large()

    async def next(self) -> bytes:
        """The next piece; `ended` says whether it was the last."""
        left = IDLE_S + self.size / MIN_BYTES_PER_S - (self._now() - self._started)
        try:
            async with asyncio.timeout(min(IDLE_S, left)):
                message = await self._receive()
        except TimeoutError:
            raise InvalidRequest("The request body did not arrive in time.", headers=_CLOSE) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        piece: bytes = message.get("body", b"")
        self.size += len(piece)
        if self.size > self._max_bytes:
            raise self._too_large()
        self.ended = not message.get("more_body", False)
        return piece

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"The request body is larger than {self._max_bytes:,} bytes.")


async def read_body(headers: list[tuple[bytes, bytes]], receive: Receive, *, max_bytes: int, lease: BodyLease) -> bytes:
    """The whole body. Raises what `read_pieces` raises."""
    return b"".join(await read_pieces(headers, receive, max_bytes=max_bytes, lease=lease))


async def read_pieces(
    headers: list[tuple[bytes, bytes]], receive: Receive, *, max_bytes: int, lease: BodyLease
) -> list[bytes]:
    """The body as it came, for who joins it elsewhere: for a large one that takes milliseconds.

    Raises what `BodyReader` raises, and `Overloaded` where the budget is spent.
    """
    reader = BodyReader(headers, receive, max_bytes=max_bytes)
    pieces: list[bytes] = []
    while not reader.ended:
        piece = await reader.next()
        lease.grow(len(piece))
        pieces.append(piece)
    return pieces
