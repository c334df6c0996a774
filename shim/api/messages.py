"""`POST /v2/messages`, `/v2/messages/stream`, `/v1/messages`: from a body to a reply, whole or as events.

Everything that can refuse a request comes before the 200: credentials, scope, body, model, plan, a place in the
engine's queue, and the usage row. The unary reply is a fold over the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import msgspec
from starlette.types import Receive, Scope, Send

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim import json_body, metrics, sse
from aiexport_edge.shim.api.access import enter, require_tokens
from aiexport_edge.shim.api.event_stream import EventStream
from aiexport_edge.shim.api.generate_request import generate_request
from aiexport_edge.shim.api.messages_request import MessagesRequest, parse_messages_request
from aiexport_edge.shim.api.reply import Reply
from aiexport_edge.shim.body import BodyLease, read_pieces
from aiexport_edge.shim.engines.generation import ClientGone, Generation
from aiexport_edge.shim.exchange import exchange_of
from aiexport_edge.shim.prices import Price
from aiexport_edge.shim.response_stream import ResponseStream, stream_of
from aiexport_edge.shim.services import Services
from aiexport_edge.shim.store import Principal
from aiexport_edge.shim.usage import Entry

PING_S = 10.0
PARSE_IN_THREAD_BYTES = 256 << 10


class Messages:
    """The ASGI endpoint. `always_stream` is `/messages/stream`, whatever the body says."""

    def __init__(self, services: Services, *, always_stream: bool = False, ping_s: float = PING_S) -> None:
        self._services = services
        self._always_stream = always_stream
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services, exchange = self._services, exchange_of(scope)
        principal = await enter(services, scope, "messages")
        require_tokens(scope)
        with services.bodies.lease() as lease:
            request = await self._read(scope, receive, lease)
            listed = services.catalog.use(request.model, principal)
            exchange.facts["model"] = listed.id
            asked = generate_request(
                request, listed, principal, services.catalog, exchange.request_id, pb.PRIORITY_INTERACTIVE
            )
            generation = Generation(asked)
            stream = stream_of(scope)
            with _abort_at_end(services, generation, stream):
                if request.images:
                    fetching = services.image_fetcher.fetch_all(request.images, lease.grow)
                    generation.images = await generation.during(fetching)
                accepted = await services.engines.admit(generation)
                reply = Reply(request, listed, generation, exchange)
                async with self._accounted(reply, principal, accepted):
                    if request.stream or self._always_stream:
                        await self._stream(reply, stream, send)
                    else:
                        await self._whole(reply, send)

    # ------------------------------------------------------------------------------------------ before the 200

    async def _read(self, scope: Scope, receive: Receive, lease: BodyLease) -> MessagesRequest:
        headers = dict(scope["headers"])
        json_body.require_json(headers.get(b"content-type"), headers.get(b"content-encoding"))
        max_bytes = self._services.config.shim.max_body_bytes
        pieces = await read_pieces(scope["headers"], receive, max_bytes=max_bytes, lease=lease)

        def parse() -> MessagesRequest:
            return parse_messages_request(json_body.parse(b"".join(pieces)), self._services.image_rules)

        if lease.size < PARSE_IN_THREAD_BYTES:
            return parse()
        return await asyncio.get_running_loop().run_in_executor(self._services.threads, parse)

    @asynccontextmanager
    async def _accounted(self, reply: Reply, principal: Principal, accepted: pb.Accepted) -> AsyncIterator[None]:
        """Around the reply: its usage row, reserved before and settled after, whatever happens between."""
        spec = reply.listed.spec
        entry = reply.entry = Entry(
            request_id=reply.exchange.request_id,
            message_id=reply.message_id,
            workspace_id=principal.workspace_id,
            key_id=principal.key_id,
            model=reply.listed.id,
            prompt_tokens=accepted.prompt_tokens,
            price=Price.per_million(spec.input_per_million, spec.output_per_million),
        )
        metrics.IN_FLIGHT.inc()
        status = "failed"
        try:
            await self._services.limits.reserve(entry, principal, accepted.prompt_tokens + accepted.max_tokens)
            yield
            status = reply.outcome
        except (ClientGone, asyncio.CancelledError):
            status = "aborted"
            raise
        finally:  # nothing may be awaited here: the task may be about to be cancelled
            metrics.IN_FLIGHT.dec()
            if entry.ended_at is None:
                reply.account(status)
                self._services.ledger.settle(entry, status)

    async def _settled(self, reply: Reply) -> None:
        """Returns when the usage of a reply that has ended is written. It comes before the reply's last bytes, so that
        what a client was told is what is billed, whatever is killed in between."""
        assert reply.entry is not None
        reply.account(reply.outcome)
        await self._services.limits.settled(reply.entry, reply.outcome)

    # ------------------------------------------------------------------------------------------ the reply

    async def _whole(self, reply: Reply, send: Send) -> None:
        message = await reply.whole()
        await self._settled(reply)
        body = msgspec.json.encode(message)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, reply: Reply, stream: ResponseStream, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
        last = await EventStream(reply, stream, self._ping_s).run()
        await self._settled(reply)
        await send({"type": "http.response.body", "body": last})


@contextmanager
def _abort_at_end(services: Services, generation: Generation, stream: ResponseStream) -> Iterator[None]:
    """A client that leaves ends the generation. At the end no engine has any of it left."""

    def gone() -> None:
        generation.fail(ClientGone())
        services.engines.abort(generation)

    stream.on_gone(gone)
    try:
        yield
    finally:
        stream.on_gone(None)
        services.engines.abort(generation)
