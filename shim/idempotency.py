"""`Idempotency-Key`: a POST that is sent twice is done once, and its final reply is given again for 24 hours.

An ASGI layer around an endpoint, which knows nothing of it. It rides on the two things that any endpoint does: as the
body's last piece is received, the key is claimed (or the request ends there: replayed, 409, 422), and what is sent is
recorded. So credentials and limits come first, no body is held twice, and a request without the header passes by.

    receive ──body──▶ SHA-256 ──last piece──▶ claim ─┬─▶ endpoint ──send──▶ deflate ──end──▶ keep, then the last piece
                                                     └─▶ taken: the kept reply, 409 or 422

A reply that is not a whole 2xx frees the key before its last byte goes out, so that a client can try again at once. A
process that dies frees its keys with its heartbeat.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aiexport_edge.shim import sse
from aiexport_edge.shim.errors import Conflict, InvalidRequest, Overloaded, Unprocessable
from aiexport_edge.shim.exchange import Exchange, exchange_of
from aiexport_edge.shim.response_stream import EXTENSION, stream_of
from aiexport_edge.shim.store.idempotency_rows import SWEEP_ROWS, Claim, IdempotencyRows, KeptReply, State, Taken

T = TypeVar("T")

HEADER = b"idempotency-key"
MAX_KEY_CHARS = 255
MAX_KEPT_BYTES = 4 << 20  # deflated; as text or events some 30 MiB, more than any output limit makes
SWEEP_S = 60.0
SWEEP_PAUSE_S = 0.1  # where there are more
RETRY_AFTER_S = 1.0
_KEY = re.compile(rb"[\x20-\x7e]{1,%d}" % MAX_KEY_CHARS)
_KEPT_HEADERS = frozenset({b"content-type", b"cache-control", b"x-accel-buffering", b"location"})
_PIECE = 64 << 10

log = logging.getLogger(__name__)


class IdempotencyKeys:
    """This process's claims. `run` for as long as it is used."""

    def __init__(self, rows: IdempotencyRows, threads: Executor) -> None:
        self._rows = rows
        self._threads = threads
        self._live: set[str] = set()

    async def claim(self, workspace_id: str, key: str, fingerprint: bytes) -> Claim | Taken:
        """Raises `Overloaded` where the store does not answer."""
        try:
            claim = await self._in_thread(lambda: self._rows.claim(workspace_id, key, fingerprint))
        except SQLAlchemyError as error:
            log.error("an idempotency key could not be looked up: %s", _reason(error))
            raise Overloaded("The store does not answer just now.", retry_after=RETRY_AFTER_S) from None
        if isinstance(claim, Claim):
            self._live.add(claim.claim_id)
        return claim

    async def keep(self, claim: Claim, reply: KeptReply | None) -> None:
        """Where the store fails the client has its reply nevertheless; the key is freed by the next sweep."""
        try:
            await self._in_thread(lambda: self._rows.keep(claim, reply))
        except SQLAlchemyError as error:
            log.error("a reply could not be kept for its idempotency key: %s", _reason(error))
        finally:
            self._live.discard(claim.claim_id)

    async def release(self, claim: Claim) -> None:
        """Returns when the key is free; what the store refuses now, the next sweep does."""
        await asyncio.wrap_future(self.release_soon(claim))

    def release_soon(self, claim: Claim) -> Future[None]:
        """The same where nothing may be awaited."""
        self._live.discard(claim.claim_id)
        return self._threads.submit(self._release, claim)

    async def run(self) -> None:
        """Deletes what has expired, until cancelled."""
        while True:
            live, gone = frozenset(self._live), 0
            try:
                gone = await self._in_thread(partial(self._rows.sweep, live))
            except SQLAlchemyError as error:
                log.error("expired idempotency keys could not be deleted: %s", _reason(error))
            await asyncio.sleep(SWEEP_S if gone < SWEEP_ROWS else SWEEP_PAUSE_S)

    def _release(self, claim: Claim) -> None:
        try:
            self._rows.release(claim)
        except SQLAlchemyError as error:
            log.error("an idempotency key could not be freed: %s", _reason(error))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class Idempotent:
    """The layer around one endpoint, which notes its caller in the exchange before it reads the body."""

    def __init__(self, app: ASGIApp, keys: IdempotencyKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [value for name, value in scope["headers"] if name == HEADER]
        if not given:
            await self._app(scope, receive, send)
            return
        attempt = _Attempt(self._keys, given, scope, receive, send)
        try:
            await self._app(attempt.scope, attempt.receive, attempt.send)
        except _Replay as replay:
            attempt.exchange.facts["idempotency"] = "replayed"
            await _send_again(replay.reply, send)
        except Exception:
            await attempt.release()
            raise
        finally:
            attempt.end()


class _Replay(Exception):
    """Carries the kept reply out through the endpoint that asked for the body."""

    def __init__(self, reply: KeptReply) -> None:
        super().__init__()
        self.reply = reply


class _Attempt:
    """One request with a key, between its endpoint and the server."""

    def __init__(self, keys: IdempotencyKeys, given: list[bytes], scope: Scope, receive: Receive, send: Send) -> None:
        self.exchange: Exchange = exchange_of(scope)
        self._stream = stream_of(scope)
        self.scope = {**scope, "extensions": {**scope["extensions"], EXTENSION: self}}
        self._keys = keys
        self._given = given
        self._receive = receive
        self._send = send
        self._digest = hashlib.sha256(scope["path"].encode("utf-8", "surrogateescape") + b"\0")
        self._received = False
        self._claim: Claim | None = None
        self._recording: _Recording | None = None

    async def receive(self) -> Message:
        """The server's message. Raises `Conflict`, `Unprocessable`, `InvalidRequest`, `Overloaded`, `_Replay`."""
        if not self._received:
            key = _key(self._given)
        message = await self._receive()
        if message["type"] == "http.request" and not self._received:
            self._digest.update(message.get("body", b""))
            if not message.get("more_body", False):
                self._received = True
                await self._begin(key)
        return message

    async def send(self, message: Message) -> None:
        if self._claim is not None:
            if message["type"] == "http.response.start":
                if 200 <= message["status"] < 300:
                    self._recording = _Recording(message)
                else:
                    await self.release()
            elif self._recording is not None:
                await self._record(message, self._recording)
        await self._send(message)

    # The response's stream, as `response_stream.py` has it: its pieces are recorded too.

    @property
    def is_full(self) -> bool:
        return self._stream.is_full

    def write(self, piece: bytes) -> None:
        if self._recording is not None:
            self._recording.add(piece)
        self._stream.write(piece)

    def offer(self, piece: bytes) -> bool:
        taken = self._stream.offer(piece)
        if taken and self._recording is not None:
            self._recording.add(piece)
        return taken

    async def room(self) -> None:
        await self._stream.room()

    def on_gone(self, callback: Callable[[], None] | None) -> None:
        self._stream.on_gone(callback)

    async def release(self) -> None:
        """Frees the key, if this attempt holds it."""
        claim, self._claim = self._claim, None
        if claim is not None:
            await self._keys.release(claim)

    def end(self) -> None:
        """The attempt is over, however: a key that it still holds is freed, without waiting."""
        claim, self._claim = self._claim, None
        if claim is not None:
            self._keys.release_soon(claim)

    async def _begin(self, key: str) -> None:
        principal = self.exchange.principal
        assert principal is not None, "the endpoint reads a body before it knows its caller"
        fingerprint = self._digest.digest()
        claim = await self._keys.claim(principal.workspace_id, key, fingerprint)
        if isinstance(claim, Claim):
            self._claim = claim
            self.exchange.origin_id = claim.origin_id
            return
        if claim.fingerprint != fingerprint:
            raise Unprocessable(
                "This Idempotency-Key was sent before with another path or body; use a new key for a new request.",
                param="Idempotency-Key",
            )
        if claim.state is State.RUNNING:
            raise Conflict(
                "The first request with this Idempotency-Key is still running; send it again when that has ended.",
                retry_after=RETRY_AFTER_S,
            )
        if claim.reply is None:
            raise Conflict(
                "The request with this Idempotency-Key is done, and its reply was too large to be kept.",
                headers=((b"x-should-retry", b"false"),),
            )
        raise _Replay(claim.reply)

    async def _record(self, message: Message, recording: _Recording) -> None:
        recording.add(message.get("body", b""))
        if message.get("more_body", False):
            return
        claim, self._claim = self._claim, None
        assert claim is not None
        if recording.is_whole:
            await self._keys.keep(claim, recording.reply())
        else:
            await self._keys.release(claim)


class _Recording:
    """A 2xx reply as it goes out, deflated piece by piece."""

    def __init__(self, start: Message) -> None:
        self._status: int = start["status"]
        headers = [(name.lower(), value) for name, value in start["headers"]]
        self._headers = [(name.decode(), value.decode("latin-1")) for name, value in headers if name in _KEPT_HEADERS]
        self._is_stream = any(name == "content-type" and "event-stream" in value for name, value in self._headers)
        self._deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
        self._pieces: list[bytes] = []
        self._size = 0
        self._last = b""

    def add(self, body: bytes) -> None:
        if body == sse.PING:
            return
        self._last = body or self._last
        if self._size <= MAX_KEPT_BYTES:
            self._take(self._deflate.compress(body))

    @property
    def is_whole(self) -> bool:
        """A stream that ends with anything but its stop event was cut off."""
        return not self._is_stream or self._last.endswith(sse.MESSAGE_STOP)

    def reply(self) -> KeptReply | None:
        """What is to be kept; None where it is too large."""
        self._take(self._deflate.flush())
        if self._size > MAX_KEPT_BYTES:
            return None
        return KeptReply(self._status, json.dumps(self._headers), b"".join(self._pieces))

    def _take(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > MAX_KEPT_BYTES:
            self._pieces.clear()
        elif piece:
            self._pieces.append(piece)


async def _send_again(reply: KeptReply, send: Send) -> None:
    headers = [(name.encode(), value.encode("latin-1")) for name, value in json.loads(reply.headers)]
    headers.append((b"idempotent-replayed", b"true"))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    inflate = zlib.decompressobj(-15)
    rest = reply.body
    while rest:
        piece = inflate.decompress(rest, _PIECE)
        rest = inflate.unconsumed_tail
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": inflate.flush()})


def _key(given: list[bytes]) -> str:
    if len(given) > 1 or not _KEY.fullmatch(given[0]):
        raise InvalidRequest(
            f"Idempotency-Key: must be sent once, as 1 to {MAX_KEY_CHARS} printable ASCII characters",
            param="Idempotency-Key",
        )
    return given[0].decode("ascii")


def _reason(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error)
