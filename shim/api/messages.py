"""`POST /v2/messages`, `/v2/messages/stream`, `/v1/messages`: from a body to a reply, whole or as events.

Everything that can refuse a request comes before the 200: credentials, scope, body, model, plan, a place in the
engine's queue, and the usage row. The unary reply is a fold over the stream.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim import json_body, metrics, sse
from aiexport_edge.shim.api.messages_request import MessagesRequest, parse_messages_request
from aiexport_edge.shim.auth.authenticator import require_scope
from aiexport_edge.shim.body import BodyLease, read_body
from aiexport_edge.shim.catalog import Listed
from aiexport_edge.shim.engines.generation import ClientGone, Generation
from aiexport_edge.shim.errors import ApiError, InvalidRequest
from aiexport_edge.shim.exchange import Exchange, exchange_of
from aiexport_edge.shim.services import Services
from aiexport_edge.shim.store import Principal
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.usage import Entry

DEFAULT_MAX_TOKENS = 1024
PING_S = 10.0
STALL_S = 120.0  # a client that takes no byte for so long is given up
PARSE_IN_THREAD_BYTES = 256 << 10
_SMALLEST_FLOAT32 = 1.2e-38  # a smaller top_p would arrive as 0, which is none
_STOP_REASONS = {
    pb.FINISH_END_TURN: "end_turn",
    pb.FINISH_MAX_TOKENS: "max_tokens",
    pb.FINISH_STOP_SEQUENCE: "stop_sequence",
}


class Messages:
    """The ASGI endpoint. `always_stream` is `/messages/stream`, whatever the body says."""

    def __init__(self, services: Services, *, always_stream: bool = False, ping_s: float = PING_S) -> None:
        self._services = services
        self._always_stream = always_stream
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services, exchange = self._services, exchange_of(scope)
        principal = await services.authenticator.authenticate(scope["headers"])
        exchange.facts.update(workspace=principal.workspace, key=principal.key_id)
        require_scope(principal, "messages")
        with services.bodies.lease() as lease:
            request = await self._read(scope, receive, lease)
            listed = services.catalog.use(request.model, principal.plan)
            exchange.facts["model"] = listed.id
            generation = Generation(self._generate_request(request, listed, principal, exchange.request_id))
            reply = _Reply(request, listed, generation, exchange)
            async with _abort_at_end(services, generation, receive):
                accepted = await services.engines.admit(generation)
                async with self._accounted(reply, principal, accepted):
                    if request.stream or self._always_stream:
                        await self._stream(reply, send)
                    else:
                        await self._whole(reply, send)

    # ------------------------------------------------------------------------------------------ before the 200

    async def _read(self, scope: Scope, receive: Receive, lease: BodyLease) -> MessagesRequest:
        headers = dict(scope["headers"])
        json_body.require_json(headers.get(b"content-type"), headers.get(b"content-encoding"))
        max_bytes = self._services.config.shim.max_body_bytes
        body = await read_body(scope["headers"], receive, max_bytes=max_bytes, lease=lease)
        if len(body) < PARSE_IN_THREAD_BYTES:
            return parse_messages_request(json_body.parse(body))
        loop = asyncio.get_running_loop()
        threads = self._services.threads
        return await loop.run_in_executor(threads, lambda: parse_messages_request(json_body.parse(body)))

    def _generate_request(
        self, request: MessagesRequest, listed: Listed, principal: Principal, request_id: str
    ) -> pb.GenerateRequest:
        limit = self._services.catalog.max_output_tokens(listed.spec)
        max_tokens = request.max_tokens
        if limit is not None:
            if max_tokens is None:
                max_tokens = limit if limit < DEFAULT_MAX_TOKENS else None
            elif max_tokens > limit:
                raise InvalidRequest(
                    f"max_tokens: {max_tokens} is more than the {limit} tokens that this model may output",
                    param="max_tokens",
                )
        roles = {"user": pb.ROLE_USER, "assistant": pb.ROLE_ASSISTANT}
        texts = [(roles[turn.role], turn.text) for turn in request.turns]
        if request.system is not None:
            texts.insert(0, (pb.ROLE_SYSTEM, request.system))
        return pb.GenerateRequest(
            request_id=request_id,
            model=listed.spec.weights,
            chat=pb.Chat(
                messages=[pb.Message(role=role, content=[pb.ContentBlock(text=text)]) for role, text in texts]
            ),
            sampling=pb.SamplingParams(
                temperature=request.temperature,
                top_p=None if request.top_p is None else max(request.top_p, _SMALLEST_FLOAT32),
                top_k=request.top_k,
                seed=secrets.randbits(64) if request.seed is None else request.seed,
                stop_sequences=request.stop_sequences,
            ),
            max_tokens=max_tokens,
            tenant=pb.Tenant(
                id=principal.workspace_id,
                weight=self._services.catalog.weight(principal.plan),
                cache_salt=principal.cache_salt,
            ),
            priority=pb.PRIORITY_INTERACTIVE,
        )

    @asynccontextmanager
    async def _accounted(self, reply: _Reply, principal: Principal, accepted: pb.Accepted) -> AsyncIterator[None]:
        """Around the reply: its usage row, reserved before and settled after, whatever happens between."""
        entry = reply.entry = Entry(
            request_id=reply.exchange.request_id,
            message_id=reply.message_id,
            workspace_id=principal.workspace_id,
            key_id=principal.key_id,
            model=reply.listed.id,
            prompt_tokens=accepted.prompt_tokens,
        )
        metrics.IN_FLIGHT.inc()
        status = "failed"
        try:
            await self._services.ledger.reserve(entry)
            yield
            status = reply.outcome
        except (ClientGone, asyncio.CancelledError):
            status = "aborted"
            raise
        finally:  # nothing may be awaited here: the task may be about to be cancelled
            metrics.IN_FLIGHT.dec()
            reply.account(status)
            self._services.ledger.settle(entry, status)

    # ------------------------------------------------------------------------------------------ the reply

    async def _whole(self, reply: _Reply, send: Send) -> None:
        texts: list[str] = []
        finished = None
        while finished is None:
            await reply.generation.wait(self._ping_s)
            text, finished = reply.take()
            texts.append(text)
        message = reply.message(text="".join(texts), finished=finished)
        body = msgspec.json.encode(message)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, reply: _Reply, send: Send) -> None:
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
        try:
            async with asyncio.timeout(None) as stalled:
                more, moved = True, 0.0
                while more:
                    if loop.time() > moved + 1.0:  # not for every event: that costs as much as making the event
                        moved = loop.time()
                        stalled.reschedule(moved + STALL_S)
                    if await reply.generation.wait(self._ping_s):
                        events, more = reply.events()
                    else:
                        events = sse.PING
                    await send({"type": "http.response.body", "body": events, "more_body": more})
        except TimeoutError:
            raise ClientGone("takes no bytes") from None


@asynccontextmanager
async def _abort_at_end(services: Services, generation: Generation, receive: Receive) -> AsyncIterator[None]:
    """Watches the connection: a client that leaves ends the generation. At the end no engine has any of it left."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.fail(ClientGone())
        services.engines.abort(generation)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        services.engines.abort(generation)


class _Reply:
    """One reply in the making: what has been taken from the generation, as message, events and usage."""

    def __init__(self, request: MessagesRequest, listed: Listed, generation: Generation, exchange: Exchange) -> None:
        self.listed = listed
        self.generation = generation
        self.exchange = exchange
        self.message_id = new_id("msg_")
        self.entry: Entry | None = None
        self.outcome = "completed"
        self._model = request.model
        self._opened = False

    def take(self) -> tuple[str, pb.Finished | None]:
        """What is new, counted. Raises what ended the generation."""
        assert self.entry is not None
        chunk = self.generation.take()
        self.entry.cached_tokens = self.generation.cached_tokens or 0
        self.entry.output_tokens = chunk.output_tokens
        if chunk.text and self.entry.first_token_at is None:
            self.entry.first_token_at = datetime.now(UTC)
            self.exchange.facts["first_ms"] = round(self.exchange.seconds * 1000, 1)
            metrics.FIRST_TOKEN_SECONDS.labels(self.listed.id).observe(self.exchange.seconds)
        return chunk.text, chunk.finished

    def events(self) -> tuple[bytes, bool]:
        """What is new as events, and whether there will be more."""
        try:
            text, finished = self.take()
        except ApiError as error:
            self.outcome = "failed"
            return sse.error(error, self.exchange.request_id), False
        events = []
        if not self._opened:
            self._opened = True
            events += [sse.message_start(self.message()), sse.BLOCK_START]
        if text:
            events.append(sse.text_delta(text))
        if finished is not None:
            assert self.entry is not None
            events += [
                sse.BLOCK_STOP,
                sse.message_delta(**_ending(finished), output_tokens=self.entry.output_tokens),
                sse.MESSAGE_STOP,
            ]
        return b"".join(events), finished is None

    def message(self, *, text: str | None = None, finished: pb.Finished | None = None) -> dict[str, Any]:
        """The message object; without `finished` the one that opens a stream."""
        assert self.entry is not None
        ending = {"stop_reason": None, "stop_sequence": None} if finished is None else _ending(finished)
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [] if text is None else [{"type": "text", "text": text}],
            **ending,
            "usage": {
                "input_tokens": self.entry.prompt_tokens - self.entry.cached_tokens,
                "cache_read_input_tokens": self.entry.cached_tokens,
                "output_tokens": 0 if finished is None else self.entry.output_tokens,
            },
        }

    def account(self, status: str) -> None:
        """Settles the counts: what never began has read nothing, and a whole reply that failed costs nothing."""
        entry = self.entry
        assert entry is not None
        if not self.generation.started or (status == "failed" and not self._opened):
            entry.prompt_tokens = entry.cached_tokens = entry.output_tokens = 0
        self.exchange.facts.update(
            outcome=status,
            input=entry.prompt_tokens - entry.cached_tokens,
            cached=entry.cached_tokens,
            output=entry.output_tokens,
        )
        metrics.MESSAGES.labels(entry.model, status).inc()
        metrics.TOKENS.labels(entry.model, "input").inc(entry.prompt_tokens - entry.cached_tokens)
        metrics.TOKENS.labels(entry.model, "cache_read").inc(entry.cached_tokens)
        metrics.TOKENS.labels(entry.model, "output").inc(entry.output_tokens)


def _ending(finished: pb.Finished) -> dict[str, Any]:
    reason = _STOP_REASONS[finished.reason]
    return {
        "stop_reason": reason,
        "stop_sequence": finished.stop_sequence if reason == "stop_sequence" else None,
    }
